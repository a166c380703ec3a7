"""The td_learning module: its vectorised algorithms against the textbook's loops, and what a run claims."""

import csv
import dataclasses
import importlib
import json

import numpy as np
import pytest
from resumed import cut_off

from finetune import registry
from finetune.errors import UserError
from finetune.rl import mdp as mdps
from finetune.rl import worlds
from finetune.run import execute

INFO = registry.find("td_learning")
main = registry.load(INFO)
prediction, control, linear, textbook, experiments = (
    importlib.import_module(f"finetune_modules.td_learning.{name}")
    for name in ("prediction", "control", "linear", "textbook", "experiments")
)
GAMMA = 0.9


def run(folder, resume=False, **changes):
    return execute(INFO, dataclasses.replace(main.Config.toy(), threads=1, **changes), folder, toy=True, resume=resume)


def tiny(**changes):
    """For what does not depend on how well is learnt."""
    return {"steps": 3, "runs": 3, "cliff_runs": 2, "cliff_episodes": 4, "bias_runs": 3, "bias_episodes": 30,
            "car_runs": 1, "car_episodes": 2, "taxi_runs": 2, "taxi_steps": 300} | changes  # fmt: skip


# --- Prediction against the textbook


@pytest.fixture(scope="module")
def walk():
    return worlds.random_walk(5, 0.0, 1.0, GAMMA)


@pytest.fixture(scope="module")
def stream(walk):
    return prediction.sample(walk, 3, 4, np.random.default_rng(0))


def episodes(stream, row):
    found, states, rewards = [], [], []
    for t in np.flatnonzero(stream.live[:, row]):
        states.append(int(stream.states[t, row]))
        rewards.append(float(stream.rewards[t, row]))
        if stream.ends[t, row]:
            found.append(([*states, int(stream.after[t, row])], rewards))
            states, rewards = [], []
    assert len(found) == 4
    assert not states
    return found


def check(walk, stream, tables, errors, learn):
    """Each of the tables (K, R, S) is what `learn(k, V, states, rewards)` makes of the same episodes."""
    truth = mdps.solve(walk, mdps.uniform(walk))[1:-1]
    for k, rows in enumerate(tables):
        for r, got in enumerate(rows):
            V = first_values(walk)
            for i, (states, rewards) in enumerate(episodes(stream, r)):
                learn(k, V, states, rewards)
                assert errors[k, r, i] == pytest.approx(np.sqrt(((V[1:-1] - truth) ** 2).mean()), abs=1e-12)
            assert np.allclose(got, V, rtol=0, atol=1e-12)


def first_values(walk):
    return np.where(walk.terminal, 0.0, 0.5)


def test_n_step_td_is_the_textbooks(walk, stream):
    n, alphas = np.array([1, 2, 5, 300]), np.array([0.1, 0.5, 0.3, 0.2])
    truth = mdps.solve(walk, mdps.uniform(walk))
    found = prediction.n_step(walk, stream, first_values(walk), n, alphas, truth)
    check(walk, stream, *found, lambda k, V, s, r: textbook.n_step_td(V, s, r, int(n[k]), alphas[k], GAMMA))
    ones = prediction.n_step(walk, stream, first_values(walk), np.ones(4, int), alphas, truth)
    check(walk, stream, *ones, lambda k, V, s, r: textbook.td0(V, s, r, alphas[k], GAMMA))


@pytest.mark.parametrize("first", [False, True])
def test_monte_carlo_is_the_textbooks(walk, stream, first):
    alphas = np.array([0.1, 0.5])
    truth = mdps.solve(walk, mdps.uniform(walk))
    found = prediction.monte_carlo(walk, stream, first_values(walk), alphas, truth, first_visit=first)
    check(walk, stream, *found, lambda k, V, s, r: textbook.monte_carlo(V, s, r, alphas[k], GAMMA, first))
    V, _ = prediction.monte_carlo(walk, stream, first_values(walk), None, truth, first_visit=first)
    for row in range(3):  # without a rate: the mean of the returns that count
        seen = {}
        for states, rewards in episodes(stream, row):
            for t, s in enumerate(states[:-1]):
                if not first or s not in states[:t]:
                    seen.setdefault(s, []).append(sum(GAMMA**i * r for i, r in enumerate(rewards[t:])))
        for s, returns in seen.items():
            assert V[0, row, s] == pytest.approx(np.mean(returns), abs=1e-12)


@pytest.mark.parametrize("trace", ["accumulating", "replacing", "dutch", "true_online"])
def test_td_lambda_is_the_textbooks(walk, stream, trace):
    lambdas, alphas = np.array([0.0, 0.5, 0.9, 1.0]), np.array([0.1, 0.5, 0.3, 0.2])
    truth = mdps.solve(walk, mdps.uniform(walk))
    found = prediction.td_lambda(walk, stream, first_values(walk), lambdas, alphas, truth, trace)
    if trace == "true_online":
        check(walk, stream, *found, lambda k, V, s, r: textbook.true_online_td_lambda(V, s, r, lambdas[k], alphas[k],
                                                                                      GAMMA))  # fmt: skip
        check(walk, stream, *found, lambda k, V, s, r: textbook.online_lambda_return(V, s, r, lambdas[k], alphas[k],
                                                                                     GAMMA))  # fmt: skip
    else:
        check(walk, stream, *found, lambda k, V, s, r: textbook.td_lambda(V, s, r, lambdas[k], alphas[k], GAMMA,
                                                                          trace))  # fmt: skip


def test_traces_without_decay_of_the_values_are_td0(walk, stream):
    truth, alphas = mdps.solve(walk, mdps.uniform(walk)), np.array([0.2])
    one, _ = prediction.n_step(walk, stream, first_values(walk), np.ones(1, int), alphas, truth)
    for trace in experiments.TRACES:
        V, _ = prediction.td_lambda(walk, stream, first_values(walk), np.zeros(1), alphas, truth, trace)
        assert np.allclose(V, one, rtol=0, atol=1e-12), "λ = 0"


def test_forward_and_backward_view_agree_for_small_steps(walk, stream):
    """TD(λ) is the offline λ-return to first order in α: the difference falls with α²."""
    truth, lam = mdps.solve(walk, mdps.uniform(walk)), 0.8
    apart = []
    for alpha in (1e-3, 1e-4):
        V, _ = prediction.td_lambda(walk, stream, first_values(walk), np.array([lam]), np.array([alpha]), truth)
        exact, _ = prediction.td_lambda(
            walk, stream, first_values(walk), np.array([lam]), np.array([alpha]), truth, "true_online"
        )
        apart.append(abs(V - exact).max())
    assert apart[1] < apart[0] / 50
    assert apart[1] < 1e-6


# --- Control


def random_world(seed=0):
    return mdps.garnet(6, 3, 3, np.random.default_rng(seed), 0.9, ending=0.2)


@pytest.mark.parametrize("kind", control.KINDS)
def test_one_step_updates_are_their_definitions(kind):
    """Every update of 200 steps, with the learner's own draws, from the tables before it."""
    mdp, epsilon, alpha, runs = random_world(), 0.3, 0.4, 4
    draw = np.random.default_rng(1)
    learners = control.Learners(mdp, (kind,), runs, alpha, epsilon, draw)
    rows = np.arange(runs)
    both = set()
    for _ in range(200):
        before = learners.Q.copy()
        state, action, reward, over = learners.step(draw)
        changed = (before != learners.Q).reshape(2, runs, -1)
        assert (changed.sum((0, 2)) <= 1).all()
        after = np.where(over, -1, learners.world.state)
        for r in rows[~over]:
            table = int(changed[1, r].any())
            both.add(table)
            q, other = before[table, r, after[r]], before[1 - table, r, after[r]]
            sums = before[:, r, after[r]].sum(0)
            if kind == "sarsa":
                value = q[learners.action[r]]
            elif kind == "expected_sarsa":
                probabilities = (
                    np.full(3, epsilon / 3) + (1 - epsilon) * (sums == sums.max()) / (sums == sums.max()).sum()
                )
                value = probabilities @ q
            elif kind == "q_learning":
                value = q.max()
            else:
                value = other[q.argmax()]
            old = before[table, r, state[r], action[r]]
            want = old + alpha * (reward[r] + mdp.gamma * value - old)
            assert learners.Q[table, r, state[r], action[r]] == pytest.approx(want, abs=1e-12)
        for r in rows[over]:
            table = int(changed[1, r].any())
            old = before[table, r, state[r], action[r]]
            assert learners.Q[table, r, state[r], action[r]] == pytest.approx(
                old + alpha * (reward[r] - old), abs=1e-12
            )
    assert both == ({0, 1} if kind == "double_q" else {0})


def test_behaviour_is_epsilon_greedy():
    q = np.array([[1.0, 1.0, 0.0, 5.0], [0.0, 2.0, 1.0, 9.0]])
    allowed = np.array([[True, True, True, False]] * 2)
    got = control.epsilon_greedy(q, allowed, 0.3)
    assert np.allclose(got, [[0.45, 0.45, 0.1, 0], [0.1, 0.8, 0.1, 0]], rtol=0, atol=1e-15)
    draw = np.random.default_rng(0)
    counts = np.bincount(mdps.pick(got[:1].cumsum(1), draw.random(20_000)), minlength=4) / 20_000
    assert abs(counts - got[0]).max() < 4 * np.sqrt(0.25 / 20_000)


@pytest.mark.parametrize(("n", "greedy"), [(1, False), (3, False), (1, True), (4, True)])
def test_tree_backup_is_the_textbooks(monkeypatch, n, greedy):
    """Section 7.5 on the very episodes that the vectorised one saw."""
    mdp, alpha, epsilon = random_world(), 0.3, 0.4
    seen = []
    real = control.Walkers.step

    def step(self, action, draw):
        state = self.state.copy()
        out = real(self, action, draw)
        seen.append((state, action, out))
        return out

    monkeypatch.setattr(control.Walkers, "step", step)
    Q, sums = control.tree_backup(mdp, n, 3, 12, alpha, epsilon, np.random.default_rng(2), greedy_target=greedy)
    for r in range(3):
        mine, episode, totals = np.zeros(mdp.size), [], []
        for state, action, (after, reward, terminated, _) in seen:
            episode.append((state[r], action[r], reward[r], after[r]))
            if terminated[r]:
                textbook.tree_backup(mine, episode, n, alpha, mdp.gamma, 0.0 if greedy else epsilon)
                totals.append(sum(x[2] for x in episode))
                episode = []
        textbook.tree_backup(mine, episode, n, alpha, mdp.gamma, 0.0 if greedy else epsilon, ended=False)
        assert np.allclose(Q[r], mine, rtol=0, atol=1e-12)
        assert np.allclose(sums[r], totals[:12], rtol=0, atol=1e-12)


def test_q_learning_finds_the_best_values():
    """With a rate that falls, on a world small enough to know: max Q within noise of V*."""
    from finetune.rl import planning

    mdp = random_world(3)
    best, _, _ = planning.policy_iteration(mdp)
    draw = np.random.default_rng(0)
    learners = control.Learners(mdp, ("q_learning", "double_q"), 8, 0.0, 1.0, draw)
    for t in range(6000):
        learners.alpha = 0.1 if t < 4000 else 0.01
        learners.step(draw)
    learnt = learners.Q[0].max(2).reshape(2, 8, -1).mean(1)
    assert abs(learnt - best)[:, ~mdp.terminal].max() < 0.1 * abs(best).max()


# --- Linear features


def test_tiles():
    """Every point has one tile of each tiling; near points share most; 2 · tilings shifts of a tile none."""
    tiles = linear.Tiles(np.array([0.0, -1.0]), np.array([1.0, 1.0]), 4, 8)
    draw = np.random.default_rng(0)
    points = draw.uniform([0, -1], [1, 1], (500, 2))
    active = tiles(points)
    assert active.shape == (500, 8)
    assert (active // tiles.each == np.arange(8)).all(), "one of each tiling"
    assert active.max() < tiles.size
    near = tiles(points + np.array([0.25 / 8, 0]))
    assert (near != active).sum(1).max() <= 2, "an eighth of a tile away"
    assert (near == active).mean() > 0.8
    inside = points[points[:, 0] < 0.7]
    assert (tiles(inside + np.array([0.25, 0])) != tiles(inside)).all(), "a whole tile away"
    assert (tiles(np.array([[9.0, 9.0]])) == tiles(np.array([[1.0, 1.0]]))).all(), "beyond is the edge"


def test_mountain_car_is_gymnasiums():
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make("MountainCar-v0").unwrapped
    state, _ = env.reset(seed=0)
    state = np.array(state, float)
    draw = np.random.default_rng(0)
    for _ in range(300):
        action = int(draw.integers(3))
        env.state = tuple(state)
        theirs, _, goal, _, _ = env.step(action)
        state, reached = linear.mountain_car(state, np.array(action))
        if goal or reached:  # theirs lies at 0.5, and goes on to 0.6
            break
        assert np.allclose(state, theirs, rtol=0, atol=1e-6)


def test_baird():
    """The expected steps over one round of states: TD's matrix has an eigenvalue with a positive real part."""
    x, after = linear.FEATURES, linear.FEATURES[6]
    steps = np.mean([np.outer(row, 0.99 * after - row) for row in x], axis=0)
    assert np.linalg.eigvals(steps).real.max() > 0.1
    draw = np.random.default_rng(0)
    td, tdc = (linear.baird(m, 30, 1000, a, b, draw) for m, a, b in (("td", 0.01, 0), ("tdc", 0.005, 0.05)))
    length = np.linalg.norm(td, axis=2)
    assert (length[-1] > 5 * length[0]).all()
    error = linear.bellman_error(tdc)
    assert (np.linalg.norm(tdc[-1], axis=1) < np.linalg.norm(tdc[0], axis=1)).all()
    assert (error[-1] < error[0] / 10).all()
    best = np.array([1, 1, 1, 1, 1, 1, 4, -2.0])
    assert np.allclose(linear.FEATURES @ best, 0), "the values can all be 0"


# --- A run


def test_three_experiments_and_taxi(tmp_path):
    """Each result against its baseline; what the quick experiments show, and Taxi."""
    summary = run(tmp_path / "run", steps=3, taxi_steps=24_000)
    metrics, missed = summary["metrics"], [n for n, reached in summary["reached"].items() if reached is False]
    assert missed == ["experiments"], "three of six"
    assert metrics["taxi"] >= 7.5 > 0 > summary["baseline"]["taxi"]
    assert metrics["five_states_td"] < 0.7 * summary["baseline"]["five_states_td"], "TD before Monte Carlo"
    assert metrics["left_double_q"] < 0.08 < metrics["left_q_learning"]
    assert metrics["baird_td_growth"] > 5 > 1 > metrics["baird_tdc_growth"]
    for name in ("random_walk", "bias", "baird", "training_curves"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 25_000, name


def test_figures_7_2_and_12_6():
    totals = experiments.Totals()
    experiments.nineteen_states(totals, 40, 1.0, np.random.default_rng(5))
    by_n = totals.mean("7.2").min(1)
    expected = {value: main.EXPECTED[f"Figure 7.2: n = {value}, best α"] for value in (1, 2, 4, 8, 16)}
    for n, error in zip(experiments.STEPS, by_n, strict=True):
        assert n not in expected or error == pytest.approx(expected[n], rel=main.WITHIN)
    assert by_n.argmin() in (1, 2, 3)
    assert by_n[-1] > by_n[0] > by_n[2] < by_n[4], "a U"
    by_lambda = totals.mean("12.6 accumulating").min(1)
    for value, error in zip(experiments.LAMBDAS[:4], by_lambda, strict=False):
        assert error == pytest.approx(main.EXPECTED[f"Figure 12.6: λ = {value:g}, best α"], rel=main.WITHIN)
    assert by_lambda[0] == pytest.approx(by_n[0], abs=1e-12), "both are TD(0)"
    assert totals.mean("12.6 true_online").min() < by_lambda.min() < by_lambda[0]


def test_example_6_6():
    totals = experiments.Totals()
    experiments.cliff(totals, 10, 250, 1.0, np.random.default_rng(5))
    sarsa, expected, q_learning, _, backup = totals.mean("6.6 last")
    assert expected > sarsa > q_learning
    assert backup > q_learning
    assert totals.mean("6.6 path") == -13, "and yet its greedy path is the shortest"


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_toy(tmp_path, seed):
    summary = run(tmp_path / "run", seed=seed)
    assert summary["passed"], {name for name, reached in summary["reached"].items() if reached is False}
    assert summary["metrics"]["left_q_learning"] > 0.08
    for name in ("n_step", "lambda", "cliff", "mountain_car"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 25_000, name


def test_without_learning_there_is_no_gain(tmp_path):
    summary = run(tmp_path / "none", **tiny(steps=0))
    assert summary["passed"] is False
    assert summary["metrics"]["experiments"] == 0
    still = run(tmp_path / "still", **tiny(rate=0.0, steps=2))
    assert still["metrics"]["taxi"] == summary["metrics"]["taxi"] < 0
    assert still["metrics"]["baird_td_growth"] == 1
    missed = {name for name, reached in still["reached"].items() if reached is False}
    assert missed >= {"taxi", "five_states_td", "baird_td_growth", "baird_tdc_error"}


def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    """In the second round of the two experiments that are quick."""
    monkeypatch.setattr(main, "EXPERIMENTS", main.EXPERIMENTS[:2])
    monkeypatch.setattr(main, "compare", lambda run, totals: None)
    steps = 4
    run(tmp_path / "whole", **tiny(steps=steps))

    with cut_off(4):
        run(tmp_path / "cut", **tiny(steps=steps))
    run(tmp_path / "cut", resume=True, **tiny(steps=steps))
    assert (tmp_path / "cut/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["metrics"] for name in ("whole", "cut"))
    assert one == two
    assert len(list(csv.DictReader((tmp_path / "cut/metrics.csv").open()))) == steps


@pytest.mark.parametrize(
    ("change", "message"),
    [({"runs": 0}, "--runs 0 is too small"), ({"rate": 1.5}, "--rate 1.5 is not within 0 and 1")],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **change)
