"""The td_learning module: its vectorized algorithms against the textbook's loops, and what a run claims."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from finetune.errors import UserError
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("td_learning")
main = registry.load(INFO)
prediction, control, n_step_control, mountain_car, gradient_td, textbook, textbook_more, batch, off_policy = (
    registry.part("td_learning", name)
    for name in ("prediction", "control", "n_step_control", "mountain_car", "gradient_td", "textbook",
                 "textbook_more", "batch", "off_policy")
)  # fmt: skip
figures, figures_control, experiments = (
    registry.part("td_learning", name) for name in ("figures_prediction", "figures_control", "experiments")
)
policy_iteration = registry.part("mdp", "policy_iteration").policy_iteration
GAMMA = 0.9


def run(folder, resume=False, **changes):
    return execute(INFO, dataclasses.replace(main.Config.toy(), threads=1, **changes), folder, toy=True, resume=resume)


def tiny(**changes):
    """For what does not depend on how well is learned."""
    return {"steps": 3, "runs": 3, "cliff_runs": 2, "cliff_episodes": 4, "bias_runs": 3, "bias_episodes": 30,
            "car_runs": 1, "car_episodes": 2, "taxi_runs": 2, "taxi_steps": 300, "dqn_steps": 64,
            "dqn_runs": 2} | changes  # fmt: skip


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
            found.append(([*states, int(stream.next_states[t, row])], rewards))
            states, rewards = [], []
    assert len(found) == 4
    assert not states
    return found


def check(walk, stream, learned, errors, learn):
    """Each of the learned tables (K, R, S) is what `learn(k, V, states, rewards)` makes of the same episodes."""
    truth = tables.solve(walk, tables.uniform(walk))[1:-1]
    for k, rows in enumerate(learned):
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
    truth = tables.solve(walk, tables.uniform(walk))
    found = prediction.n_step(walk, stream, first_values(walk), n, alphas, truth)
    check(walk, stream, *found, lambda k, V, s, r: textbook.n_step_td(V, s, r, int(n[k]), alphas[k], GAMMA))
    ones = prediction.n_step(walk, stream, first_values(walk), np.ones(4, int), alphas, truth)
    check(walk, stream, *ones, lambda k, V, s, r: textbook.td0(V, s, r, alphas[k], GAMMA))


@pytest.mark.parametrize("first", [False, True])
def test_monte_carlo_is_the_textbooks(walk, stream, first):
    alphas = np.array([0.1, 0.5])
    truth = tables.solve(walk, tables.uniform(walk))
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
    truth = tables.solve(walk, tables.uniform(walk))
    found = prediction.td_lambda(walk, stream, first_values(walk), lambdas, alphas, truth, trace)
    if trace == "true_online":
        check(walk, stream, *found, lambda k, V, s, r: textbook.true_online_td_lambda(V, s, r, lambdas[k], alphas[k],
                                                                                      GAMMA))  # fmt: skip
        online = textbook_more.online_lambda_return
        check(walk, stream, *found, lambda k, V, s, r: online(V, s, r, lambdas[k], alphas[k], GAMMA))
    else:
        check(walk, stream, *found, lambda k, V, s, r: textbook.td_lambda(V, s, r, lambdas[k], alphas[k], GAMMA,
                                                                          trace))  # fmt: skip


def test_traces_without_decay_of_the_values_are_td0(walk, stream):
    truth, alphas = tables.solve(walk, tables.uniform(walk)), np.array([0.2])
    one, _ = prediction.n_step(walk, stream, first_values(walk), np.ones(1, int), alphas, truth)
    for trace in figures.TRACES:
        V, _ = prediction.td_lambda(walk, stream, first_values(walk), np.zeros(1), alphas, truth, trace)
        assert np.allclose(V, one, rtol=0, atol=1e-12), "λ = 0"


def test_forward_and_backward_view_agree_for_small_steps(walk, stream):
    """TD(λ) is the offline λ-return to first order in α: the difference falls with α²."""
    truth, lam = tables.solve(walk, tables.uniform(walk)), 0.8
    apart = []
    for alpha in (1e-3, 1e-4):
        V, _ = prediction.td_lambda(walk, stream, first_values(walk), np.array([lam]), np.array([alpha]), truth)
        exact, _ = prediction.td_lambda(
            walk, stream, first_values(walk), np.array([lam]), np.array([alpha]), truth, "true_online"
        )
        apart.append(abs(V - exact).max())
    assert apart[1] < apart[0] / 50
    assert apart[1] < 1e-6


def test_td_lambda_is_the_offline_lambda_return_as_the_rate_goes_to_zero(walk, stream):
    """What they learn from one episode, over α: the difference falls with α, here to below a millionth."""
    lam, truth, first = 0.8, np.zeros(7), np.random.default_rng(0).standard_normal(7) * ~walk.terminal
    live = stream.live & (stream.episode == 0)
    once = dataclasses.replace(stream, live=live, ends=stream.ends & live)
    apart = []
    for alpha in (1e-3, 1e-8):
        V, _ = prediction.td_lambda(walk, once, first, np.array([lam]), np.array([alpha]), truth)
        for row in range(3):
            mine = first.copy()
            textbook_more.offline_lambda_return(mine, *episodes(stream, row)[0], lam, alpha, GAMMA)
            assert abs(mine - first).max() > alpha / 10
            apart.append(abs((V[0, row] - mine) / alpha).max())
    assert max(apart[3:]) < 1e-6
    assert max(apart[:3]) > 1e-5, "at a larger rate they are not the same"


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_lambda_returns_are_torchrls(walk, stream, lam):
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    V = np.random.default_rng(0).standard_normal(7) * ~walk.terminal
    for states, rewards in episodes(stream, 0):
        column = [torch.tensor(x, dtype=torch.float64)[:, None] for x in (V[states[1:]], rewards)]
        done = torch.zeros(len(rewards), 1, dtype=torch.bool)
        done[-1] = True
        theirs = functional.td_lambda_return_estimate(GAMMA, lam, *column, done, done)
        mine = [textbook_more.lambda_return(V, states, rewards, t, lam, GAMMA) for t in range(len(rewards))]
        assert np.allclose(theirs[:, 0], mine, rtol=0, atol=1e-12)


# --- A batch of episodes, again and again


@pytest.fixture(scope="module")
def counts(walk, stream):
    made = batch.Counts.none(3, 7)
    for episode in range(4):
        made.add(stream, prediction.returns(stream, GAMMA)[0], episode)
    return made


@pytest.mark.parametrize("method", batch.METHODS)
def test_sweeps_over_counts_are_sweeps_over_the_episodes(walk, stream, counts, method):
    V = batch.converge(counts, np.tile(first_values(walk), (3, 1)), GAMMA, 0.7, method, tolerance=0, max_sweeps=5)
    for row in range(3):
        mine = first_values(walk)
        textbook_more.batch(mine, episodes(stream, row), 0.7 / counts.visits[row].max(), GAMMA, method, 5)
        assert np.allclose(V[row], mine, rtol=0, atol=1e-12)


def test_batch_td_is_certainty_equivalence_and_batch_monte_carlo_the_mean_return(walk, stream, counts):
    start = np.tile(first_values(walk), (3, 1))
    td, mc = (batch.converge(counts, start, GAMMA, 1.0, method, tolerance=1e-14) for method in batch.METHODS)
    for row in range(3):
        steps, seen = {}, {}
        for states, rewards in episodes(stream, row):
            for t, s in enumerate(states[:-1]):
                steps.setdefault(s, []).append((states[t + 1], rewards[t]))
                seen.setdefault(s, []).append(sum(GAMMA**i * r for i, r in enumerate(rewards[t:])))
        A, b = np.eye(7), np.zeros(7)  # the most likely reward process, from the steps
        for s, found in steps.items():
            for after, reward in found:
                A[s, after] -= GAMMA / len(found)
                b[s] += reward / len(found)
        exact = np.linalg.solve(A, b)
        assert set(steps) == set(seen) <= set(range(1, 6))
        for s in steps:
            assert td[row, s] == pytest.approx(exact[s], abs=1e-8)
            assert mc[row, s] == pytest.approx(np.mean(seen[s]), abs=1e-8)
        assert np.allclose(batch.certainty_equivalence(counts, row, GAMMA)[list(steps)], exact[list(steps)], atol=1e-12)
        assert abs(td[row] - mc[row]).max() > 1e-3, "they are not the same"


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_figure_6_2_and_you_are_the_predictor(seed):
    totals = experiments.Totals()
    figures.batch_updating(main.Config.toy(), totals, np.random.default_rng(seed))
    td, mc = (totals.mean(f"6.2 batch {method}") for method in batch.METHODS)
    assert (td[1:] < mc[1:]).all(), "with every number of episodes but one"
    assert td.mean() < 0.8 * mc.mean()
    assert totals.mean("6.2 batch gap") < 1e-8
    assert np.allclose(totals.mean("6.4 td"), [0.75, 0.75, 0], rtol=0, atol=1e-10)
    assert np.allclose(totals.mean("6.4 mc"), [0, 0.75, 0], rtol=0, atol=1e-10)


# --- Importance sampling


def test_blackjack():
    """The book's value of Example 5.4 is itself a mean, of a hundred million episodes; gymnasium's episodes agree."""
    world, _, value = figures.blackjack_state()
    assert value == pytest.approx(-0.27726, abs=2e-4)
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make("Blackjack-v1", sab=True).unwrapped
    env.reset(seed=0)
    rng, found = np.random.default_rng(0), []
    for _ in range(4000):
        env.player, (second,) = [1, 2], [int(rng.integers(1, 14))]
        env.dealer, over = [2, min(second, 10)], False
        while not over:
            _, reward, over, _, _ = env.step(int(rng.integers(2)))
        found.append(reward)
    exact = tables.performance(world, tables.uniform(world))
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / np.sqrt(len(found)))
    states = np.arange(200)
    sums, ace = states // 10 % 10 + 12, states >= 100
    best = tables.greedy(world, policy_iteration(world)[0])[:200, 0] == 1  # sticks
    assert best[(sums >= 19) | (~ace & (sums >= 17))].all()
    assert not best[(ace & (sums <= 17))].any()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_importance_sampling_is_unbiased_and_ratios_of_decisions_vary_less(seed):
    world, target, value = figures.paying_world()
    G, rho, each = off_policy.sample(world, target, tables.uniform(world), 100, 1000, np.random.default_rng(seed))
    count = G.size
    for values, exact in ((rho * G, value), (each, value), (rho, 1.0)):
        assert values.mean() == pytest.approx(exact, abs=5 * values.std() / np.sqrt(count))
    assert each.var() < (rho * G).var()
    behavior = tables.performance(world, tables.uniform(world))
    assert abs(G.mean() - behavior) < 5 * G.std() / np.sqrt(count)
    assert abs(value - behavior) > 20 * G.std() / np.sqrt(count), "what is seen is not what is asked for"


def test_weighted_importance_sampling_is_the_textbooks():
    world, target, _ = figures.paying_world()
    target = tables.one_hot(world, np.zeros(len(world.terminal), int))  # many ratios are 0
    G, rho, each = off_policy.sample(world, target, tables.uniform(world), 3, 200, np.random.default_rng(0), chunk=100)
    assert (rho == 0).any()
    for row, got in enumerate(off_policy.weighted(G, rho)):
        assert np.allclose(got, textbook_more.weighted_importance(G[row], rho[row]), rtol=0, atol=1e-10)
    assert np.allclose(each[rho == 2], (G * rho)[rho == 2]), "episodes of one step"


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_figure_5_3_and_infinite_variance(seed):
    totals = experiments.Totals()
    figures.importance(main.Config.toy(), totals, np.random.default_rng(seed))
    assert totals.mean("5.3 weighted early") < totals.mean("5.3 ordinary early") / 2
    for name in off_policy.ESTIMATORS:
        assert totals.mean(f"5.3 {name}")[-1] < 0.005
    paths = figures.loop_paths(np.random.default_rng(seed))
    assert set(np.unique(paths["weighted"])) <= {0.0, 1.0}
    assert (paths["weighted"][:, -1] == 1).all()
    assert abs(paths["ordinary"][:, -1] - 1).mean() > 0.05, "after 100 000 episodes"


# --- Control


def random_world(seed=0):
    return tables.garnet(6, 3, 3, np.random.default_rng(seed), 0.9, ending=0.2)


class Script:
    """An environment, and the random numbers of the ε-greedy policy, that repeat what a row of Learners did."""

    def __init__(self, steps, coins):
        self.steps, self.coins, self.at = steps, iter(coins), 0

    def reset(self):
        return self.steps[self.at][0]

    def choice(self, count, p):
        """The action taken at this time. After the last step of all it is not known, and not learned from either."""
        if self.at == len(self.steps):
            return 0
        action = self.steps[self.at][1]
        assert p[action] > 0, "the textbook's policy could have taken it"
        return action

    def random(self):
        return 0.25 + 0.5 * next(self.coins)  # below ½, coin 0: the first table learns

    def step(self, action):
        _, taken, reward, next_state, over = self.steps[self.at]
        assert action == taken
        self.at += 1
        return next_state, reward, over


class Recorded:
    """A random number generator that keeps the coins of double Q-learning."""

    def __init__(self, rng):
        self.rng, self.coins = rng, None

    def integers(self, *args, **kwargs):
        self.coins = self.rng.integers(*args, **kwargs)
        return self.coins

    def random(self, size):
        return self.rng.random(size)


@pytest.mark.parametrize("kind", control.KINDS)
def test_one_step_control_is_the_textbooks(kind):
    """The same experience, row by row and episode by episode, leads to the same tables."""
    mdp, epsilon, alpha, runs, episodes = random_world(), 0.3, 0.4, 3, 40
    rng = Recorded(np.random.default_rng(1))
    learners = control.Learners(mdp, (kind,), runs, alpha, epsilon, rng)
    steps, coins, compared = [[] for _ in range(runs)], [[] for _ in range(runs)], 0
    while (learners.envs.episode < episodes).any():
        episode = learners.envs.episode.copy()
        learners.envs.step = watch(learners.envs, seen := [])
        learners.step(rng)
        state, action, next_state, reward, over = seen[0]
        for r in np.flatnonzero(episode < episodes):
            steps[r].append((state[r], action[r], reward[r], next_state[r], over[r]))
            coins[r].append(int(rng.coins[r]) if kind == "double_q" else 0)
            if episode[r] == episodes - 1 and over[r]:
                check_textbook(kind, steps[r], coins[r], learners.Q[:, r].copy(), alpha, epsilon)
                compared += 1
    assert compared == runs


def watch(envs, seen):
    """The step of these environments, which puts what happened into `seen`."""

    def step(action, rng):
        state = envs.state.copy()
        next_state, reward, terminated, over = type(envs).step(envs, action, rng)
        seen.append((state, action.copy(), next_state, reward, over))
        return next_state, reward, terminated, over

    return step


def check_textbook(kind, steps, coins, wanted, alpha, epsilon):
    script, Q = Script(steps, coins), np.zeros_like(wanted)
    while script.at < len(steps):
        if kind == "double_q":
            textbook.double_q_learning(script, Q[0], Q[1], alpha, GAMMA, epsilon, script)
        else:
            loop = {"sarsa": textbook.sarsa, "expected_sarsa": textbook.expected_sarsa,
                    "q_learning": textbook.q_learning}[kind]  # fmt: skip
            loop(script, Q[0], alpha, GAMMA, epsilon, script)
    assert np.allclose(Q, wanted, rtol=0, atol=1e-12)
    assert abs(Q[0]).max() > 0.5


def test_behavior_is_epsilon_greedy():
    q = np.array([[1.0, 1.0, 0.0, 5.0], [0.0, 2.0, 1.0, 9.0]])
    allowed = np.array([[True, True, True, False]] * 2)
    got = control.epsilon_greedy(q, allowed, 0.3)
    assert np.allclose(got, [[0.45, 0.45, 0.1, 0], [0.1, 0.8, 0.1, 0]], rtol=0, atol=1e-15)
    rng = np.random.default_rng(0)
    counts = np.bincount(tables.pick(got[:1].cumsum(1), rng.random(20_000)), minlength=4) / 20_000
    assert abs(counts - got[0]).max() < 4 * np.sqrt(0.25 / 20_000)


@pytest.fixture
def watched(monkeypatch):
    """Every step of the environments: states, actions, outcomes, and π/b of the actions where there is one."""
    steps, ratios = [], [None]
    step, act = control.TabularEnvs.step, n_step_control.act

    def watched_step(self, action, rng):
        state = self.state.copy()
        out = step(self, action, rng)
        steps.append((state, action, out, ratios[-1]))
        return out

    def watched_act(q, allowed, epsilon, target, rng):
        action, ratio = act(q, allowed, epsilon, target, rng)
        pi, b = (control.epsilon_greedy(q, allowed, e)[np.arange(len(q)), action] for e in (target, epsilon))
        assert np.array_equal(ratio, pi / b)
        ratios.append(ratio)
        return action, ratio

    monkeypatch.setattr(control.TabularEnvs, "step", watched_step)
    monkeypatch.setattr(n_step_control, "act", watched_act)
    return steps


@pytest.mark.parametrize(("n", "greedy"), [(1, False), (3, False), (1, True), (4, True)])
def test_q_0_is_the_textbooks_tree_backup(watched, n, greedy):
    """Section 7.5 on the very episodes that the vectorized one saw."""
    mdp, alpha, epsilon = random_world(), 0.3, 0.4
    target = 0.0 if greedy else epsilon
    rng = np.random.default_rng(2)
    learners = n_step_control.QSigma(mdp, n, 0.0, 3, alpha, epsilon, rng, target_epsilon=0.0 if greedy else None)
    (sums,), Q = control.run_episodes(learners, 12, rng), learners.Q
    for r in range(3):
        mine, episode, totals = np.zeros(mdp.size), [], []
        for state, action, (after, reward, terminated, _), _ in watched:
            episode.append((state[r], action[r], reward[r], after[r]))
            if terminated[r]:
                textbook_more.tree_backup(mine, episode, n, alpha, mdp.gamma, target)
                totals.append(sum(x[2] for x in episode))
                episode = []
        textbook_more.tree_backup(mine, episode, n, alpha, mdp.gamma, target, ended=False)
        assert np.allclose(Q[r], mine, rtol=0, atol=1e-12)
        assert np.allclose(sums[r], totals[:12], rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", [None, 0.1])
@pytest.mark.parametrize(("n", "sigma"), [(1, 1.0), (3, 1.0), (1, 0.5), (4, 0.3)])
def test_q_sigma_is_the_sum_of_td_errors_and_q_1_n_step_sarsa(watched, n, sigma, target):
    """One run, so that every episode is whole."""
    mdp, alpha, epsilon = random_world(), 0.2, 0.4
    rng = np.random.default_rng(3)
    learners = n_step_control.QSigma(mdp, n, sigma, 1, alpha, epsilon, rng, target_epsilon=target)
    control.run_episodes(learners, 40, rng)
    Q = learners.Q
    sarsa, td_errors, episode, ratios = np.zeros(mdp.size), np.zeros(mdp.size), [], []
    for (state,), (action,), ((after,), (reward,), (terminated,), _), (ratio,) in watched:
        episode.append((state, action, reward, after))
        ratios.append(ratio)
        if terminated:
            textbook_more.n_step_sarsa(sarsa, episode, ratios, n, alpha, mdp.gamma)
            textbook_more.q_sigma(
                td_errors, episode, ratios, n, sigma, alpha, mdp.gamma, epsilon if target is None else target
            )
            episode, ratios = [], []
    assert np.allclose(Q[0], td_errors, rtol=0, atol=1e-11)
    assert np.allclose(Q[0], sarsa, rtol=0, atol=1e-11) == (sigma == 1)


def test_without_lambda_traces_change_nothing():
    mdp, kinds = random_world(), ("sarsa", "expected_sarsa", "q_learning")
    made = []
    for lam in (None, 0.0, 0.5):
        rng = np.random.default_rng(4)
        if lam is None:
            learners = control.Learners(mdp, kinds, 3, 0.4, 0.3, rng)
        else:
            learners = control.TraceLearners(mdp, kinds, 3, 0.4, 0.3, rng, lam=lam)
        for _ in range(200):
            learners.step(rng)
        made.append(learners.Q)
    assert np.array_equal(made[0], made[1])
    assert not np.allclose(made[0], made[2])


@pytest.mark.parametrize("kind", ["sarsa", "q_learning"])
def test_traces_are_the_textbooks(watched, kind):
    """SARSA(λ), and Watkins' Q(λ), whose traces are cut: both often enough."""
    mdp, alpha, lam, rng = random_world(), 0.3, 0.8, np.random.default_rng(5)
    learners = control.TraceLearners(mdp, (kind,), 2, alpha, 0.4, rng, lam=lam)
    for _ in range(300):
        learners.step(rng)
    for r in range(2):
        mine, episode = np.zeros(mdp.size), []
        for state, action, (after, reward, terminated, _), _ in watched:
            episode.append((state[r], action[r], reward[r], after[r]))
            if terminated[r]:
                textbook_more.traces(mine, episode, None, lam, alpha, mdp.gamma, kind == "q_learning")
                episode = []
        textbook_more.traces(mine, episode, learners.action[r], lam, alpha, mdp.gamma, kind == "q_learning")
        assert np.allclose(learners.Q[0, r], mine, rtol=0, atol=1e-12)


def test_q_learning_finds_the_best_values():
    """With a rate that falls, on a world small enough to know: max Q within noise of V*."""
    mdp = random_world(3)
    best, _, _ = policy_iteration(mdp)
    rng = np.random.default_rng(0)
    learners = control.Learners(mdp, ("q_learning", "double_q"), 8, 0.0, 1.0, rng)
    for t in range(6000):
        learners.alpha = 0.1 if t < 4000 else 0.01
        learners.step(rng)
    learned = learners.Q[0].max(2).reshape(2, 8, -1).mean(1)
    assert abs(learned - best)[:, ~mdp.terminal].max() < 0.1 * abs(best).max()


# --- Linear features


def test_tiles():
    """Every point has one tile of each tiling; near points share most; 2 · tilings shifts of a tile none."""
    tiles = mountain_car.Tiles(np.array([0.0, -1.0]), np.array([1.0, 1.0]), 4, 8)
    rng = np.random.default_rng(0)
    points = rng.uniform([0, -1], [1, 1], (500, 2))
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
    rng = np.random.default_rng(0)
    for _ in range(300):
        action = int(rng.integers(3))
        env.state = tuple(state)
        theirs, _, goal, _, _ = env.step(action)
        state, reached = mountain_car.mountain_car(state, np.array(action))
        if goal or reached:  # theirs lies at 0.5, and goes on to 0.6
            break
        assert np.allclose(state, theirs, rtol=0, atol=1e-6)


def test_baird():
    """The expected steps over one round of states: TD's matrix has an eigenvalue with a positive real part."""
    x, after = gradient_td.FEATURES, gradient_td.FEATURES[6]
    steps = np.mean([np.outer(row, 0.99 * after - row) for row in x], axis=0)
    assert np.linalg.eigvals(steps).real.max() > 0.1
    rng = np.random.default_rng(0)
    td, *gradient = (gradient_td.baird(m, 30, 1000, a, b, rng)
                     for m, a, b in (("td", 0.01, 0), ("tdc", 0.005, 0.05), ("gtd2", 0.005, 0.05)))  # fmt: skip
    length = np.linalg.norm(td, axis=2)
    assert (length[-1] > 5 * length[0]).all()
    for w in gradient:
        error = gradient_td.bellman_error(w)
        assert (np.linalg.norm(w[-1], axis=1) < np.linalg.norm(w[0], axis=1)).all()
        assert (error[-1] < error[0] / 10).all()
    one = {m: gradient_td.baird(m, 500, 1, 0.01, 0.05, np.random.default_rng(1)) for m in figures_control.METHODS}
    assert np.array_equal(one["td"], one["tdc"]), "with h = 0 TDC is TD"
    assert np.array_equal(one["gtd2"][1], one["gtd2"][0]), "and GTD2 stands still"
    best = np.array([1, 1, 1, 1, 1, 1, 4, -2.0])
    assert np.allclose(gradient_td.FEATURES @ best, 0), "the values can all be 0"


# --- The unit of rewards


@pytest.mark.parametrize("factor", [100.0, 0.01])
@pytest.mark.parametrize("kind", control.KINDS)
def test_control_learns_in_any_unit_of_reward(kind, factor):
    """Along the cliff: −13 is the shortest path, an untrained policy gets a few hundred below."""
    cliff = worlds.world("cliff_walking")
    mdp = tables.make(cliff.P, factor * cliff.rewards, 1.0, terminal=cliff.terminal, start=cliff.start)
    rng = np.random.default_rng(0)
    sums = control.run_episodes(control.Learners(mdp, (kind,), 5, 0.5, 0.1, rng, limit=300), 150, rng)
    assert sums[0, :, -50:].mean() > factor * -75
    assert sums[0, :, :3].mean() < factor * -200


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_prediction_learns_in_any_unit_of_reward(factor):
    """Example 6.2's error of TD(0) with α = 0.05 after 100 episodes is 0.036, from 0.236."""
    walk = worlds.random_walk(5, 0.0, factor)
    truth, rng = tables.solve(walk, tables.uniform(walk)), np.random.default_rng(0)
    stream = prediction.sample(walk, 20, 100, rng)
    V = np.where(walk.terminal, 0.0, 0.5 * factor)
    _, td = prediction.n_step(walk, stream, V, np.ones(1, int), np.array([0.05]), truth)
    assert td[0, :, -1].mean() < 0.05 * factor
    assert td[0, :, 0].mean() > 0.2 * factor


# --- A run


def test_the_textbook_trains(tmp_path):
    """`--experiment textbook`: each loop learns, and metrics.csv has its curve."""
    summary = run(tmp_path / "run", experiment="textbook", steps=16)
    assert summary["passed"]
    assert set(summary["metrics"]) == {"error_td_0", "return_sarsa", "return_q_learning"}
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert header == ("step,error_monte_carlo,error_td_0,error_4_step_td,error_td_lambda,error_true_online_td_lambda,"
                      "return_sarsa,return_expected_sarsa,return_q_learning,return_double_q_learning")  # fmt: skip
    assert (tmp_path / "run/textbook.png").stat().st_size > 25_000


@pytest.mark.parametrize("name", ["td0", "q_learning"])
def test_the_readme_shows_the_textbooks_code(name):
    readme = (INFO.folder / "README.md").read_text(encoding="utf-8")
    assert inspect.getsource(getattr(textbook, name)).rstrip() in readme


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_toy(tmp_path, seed):
    """The book's experiments, Taxi and DQN reach their targets; the orders of the figures hold."""
    summary = run(tmp_path / "run", seed=seed)
    checks = {name: check["value"] for name, check in summary["checks"].items()}
    broken = {name for name, check in summary["checks"].items() if not check["passed"]}
    missed = {name for name, reached in summary["reached"].items() if reached is False}
    assert summary["passed"], missed | broken
    metrics, baseline = summary["metrics"], summary["baseline"]
    assert set(metrics) == {"five_states_td", "n_step_error", "left_double_q", "cliff_sarsa", "taxi", "cartpole_all"}
    assert metrics["five_states_td"] < 0.7 * baseline["five_states_td"], "TD before Monte Carlo"
    assert checks["best_n"] in (2, 4, 8)
    assert checks["true_online_error"] < checks["td_lambda_error"] < baseline["n_step_error"]
    assert checks["left_q_learning"] > 0.08, "more than exploration, 0.05"
    assert checks["cliff_expected_sarsa"] > metrics["cliff_sarsa"] > checks["cliff_q_learning"]
    assert checks["cliff_tree_backup"] > checks["cliff_q_sigma"] > checks["cliff_n_step_sarsa"]
    for trace, without in (("sarsa_lambda", "sarsa"), ("q_lambda", "q_learning")):
        assert checks[f"cliff_{trace}_first_50"] > checks[f"cliff_{without}_first_50"]
    assert checks["cliff_q_learning_greedy"] == -13, "its greedy path is the shortest"
    for name in ("random_walk", "bias", "baird", "dqn", "training_curves", "n_step", "lambda", "cliff",
                 "mountain_car", "batch", "importance"):  # fmt: skip
        assert (tmp_path / f"run/{name}.png").stat().st_size > 25_000, name


def test_without_learning_there_is_no_gain(tmp_path, no_pictures):
    summary = run(tmp_path / "none", **tiny(steps=0))
    assert summary["passed"] is False
    assert summary["checks"]["experiments"] == {"value": 0, "at_least": 8, "passed": False}
    still = run(tmp_path / "still", **tiny(rate=0.0, steps=2))
    assert still["metrics"]["taxi"] == summary["metrics"]["taxi"] < 0
    assert still["checks"]["baird_td_growth"]["value"] == 1
    missed = {name for name, reached in still["reached"].items() if reached is False}
    broken = {name for name, check in still["checks"].items() if not check["passed"]}
    assert missed >= {"taxi", "five_states_td"}
    assert broken >= {"baird_td_growth", "baird_tdc_error"}


def test_one_experiment_alone(tmp_path, no_pictures):
    summary = run(tmp_path / "run", **tiny(experiment="bias", steps=2, bias_runs=200))
    assert set(summary["metrics"]) == {"left_double_q"}
    assert (tmp_path / "run/metrics.csv").read_text().splitlines()[0].split(",")[1:] == [
        f"left_{kind}" for kind in figures_control.BIAS_KINDS
    ]


def test_what_a_checkpoint_holds_is_the_whole_state():
    """Taxi's learners and DQN's: after two steps, saved, and loaded into fresh ones, the third is the same."""
    mdp, runs = worlds.world("taxi"), 2

    def fresh():
        return control.Learners(mdp, ("q_learning",), runs, 1.0, 0.1, np.random.default_rng(0), limit=200)

    one, two = fresh(), fresh()
    for _ in range(300):
        one.step(rng := np.random.default_rng(1))
    two.load_state_dict(one.state_dict())
    for learners in (one, two):
        learners.step(np.random.default_rng(2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert rng is not None
    totals, other = experiments.Totals(), experiments.Totals()
    totals.add("x", np.arange(6.0).reshape(2, 3))
    other.load_state_dict(totals.state_dict())
    assert np.array_equal(other.error("x"), totals.error("x"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": 0}, "--runs 0 is too small"),
        ({"rate": 1.5}, "--rate 1.5 is too large: it must be at most 1"),
        ({"variants": "dqn,duelling"}, "'duelling' is not one of dqn, .*dueling"),
        ({"experiment": "clif"}, "--experiment 'clif': expected all|textbook"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **change)
