"""Control of the td_learning module: tables equal to the textbook's loops, tile coding, gradient TD."""

import numpy as np
import pytest

from finetune.rl.tabular import mdp as tables
from finetune.runs import registry

control, n_step_control, mountain_car, gradient_td, textbook, textbook_more, figures_control = (
    registry.part("td_learning", name)
    for name in ("control", "n_step_control", "mountain_car", "gradient_td", "textbook", "textbook_more",
                 "figures_control")
)  # fmt: skip
policy_iteration = registry.part("mdp", "policy_iteration").policy_iteration
GAMMA = 0.9


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
