"""Prediction of the td_learning module: the vectorized algorithms find the tables of the textbook's loops."""

import dataclasses

import numpy as np
import pytest
import torch

from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.runs import registry

main = registry.load(registry.find("td_learning"))
prediction, batch, off_policy, textbook, textbook_more, figures, experiments = (
    registry.part("td_learning", name)
    for name in ("prediction", "batch", "off_policy", "textbook", "textbook_more", "figures_prediction", "experiments")
)
policy_iteration = registry.part("mdp", "policy_iteration").policy_iteration
GAMMA = 0.9


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
