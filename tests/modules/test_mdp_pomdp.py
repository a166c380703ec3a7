"""Average reward and POMDPs of the mdp module: against linear programs, all policies and all plans."""

import itertools

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.runs import registry

main = registry.load(registry.find("mdp"))
pomdp = registry.part("mdp", "pomdp")
average_reward = registry.part("mdp", "average_reward")
synchronous = registry.part("mdp", "value_iteration").synchronous


def unichain(states, actions, seed):
    rng = np.random.default_rng(seed)
    P = 0.9 * rng.dirichlet(np.full(states, 0.3), (states, actions)) + 0.1 / states
    return tables.make(P, rng.normal(size=(states, actions)), 0.9, terminal=[False] * states)


# --- The average reward


def test_gain_and_bias_are_the_sums_they_stand_for():
    mdp = unichain(6, 2, 0)
    gain, bias = average_reward.gain_and_bias(mdp, tables.uniform(mdp))
    P, r = tables.under(mdp, tables.uniform(mdp))
    now, total = np.eye(6), np.zeros(6)
    for _ in range(400):
        total, now = total + now @ r - gain, now @ P
    assert np.allclose(now @ r, gain, rtol=0, atol=1e-12)
    assert np.allclose(total, bias, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_the_gain_is_the_best_of_all_policies(seed):
    mdp = unichain(4, 3, seed)
    every = [tables.one_hot(mdp, list(a)) for a in itertools.product(range(3), repeat=4)]
    best = max(average_reward.gain_and_bias(mdp, policy)[0] for policy in every)
    gain, bias, policy, _ = average_reward.average_reward_iteration(mdp, every[0])
    assert gain == pytest.approx(best, abs=1e-12)
    assert average_reward.gain_and_bias(mdp, policy)[0] == pytest.approx(best, abs=1e-12)
    assert np.allclose(synchronous(mdp.discounted(1.0), bias), bias + gain, rtol=0, atol=1e-11)


@pytest.mark.parametrize("c", [1e-12, 1e-8, 1e-3, 1e8, 1e12])
def test_the_size_of_rewards_changes_neither_the_best_gain_nor_the_plans(c):
    for mdp in (worlds.access_control(), unichain(8, 3, 5)):
        large = tables.make(mdp.P, mdp.rewards * c, 0.9, terminal=[False] * mdp.size[0], allowed=mdp.allowed)
        first = tables.one_hot(mdp, [0] * mdp.size[0])
        gain, bias, policy, count = average_reward.average_reward_iteration(mdp, first)
        found = average_reward.average_reward_iteration(large, first)
        assert found[0] == pytest.approx(c * gain, rel=1e-10)
        assert np.allclose(found[1] / c, bias, rtol=0, atol=1e-10 * abs(bias).max())
        assert np.array_equal(found[2], policy)
        assert found[3] == count
    beliefs = np.random.default_rng(0).dirichlet(np.ones(3), 500)
    for problem in (some_pomdp(3, 3, 2, 4), some_pomdp()):
        mdp = problem.mdp
        large = pomdp.POMDP(tables.make(mdp.P, mdp.rewards * c, 0.9, terminal=[False] * 3), problem.observe)
        for margin in (1e-10, 1e-3):
            mine, other = pomdp.solve(problem, 4, margin)[-1], pomdp.solve(large, 4, margin)[-1]
            assert len(mine[0]) == len(other[0])
            assert np.array_equal(pomdp.optimal_action(beliefs, mine), pomdp.optimal_action(beliefs, other))
            assert np.allclose(pomdp.value(beliefs, other) / c, pomdp.value(beliefs, mine), rtol=0, atol=1e-8)


@pytest.mark.parametrize("step", [0.5, 0.9])
def test_the_gain_lies_between_the_bounds_of_every_sweep(step):
    """And they close in, on a chain that alternates too, where a whole step would leave them apart for ever."""
    to_and_fro = tables.make(np.eye(2)[[[1], [0]]], [[1.0], [3.0]], 0.9, terminal=[False] * 2)
    for mdp in (worlds.access_control(), to_and_fro, unichain(5, 2, 4)):
        gain = average_reward.average_reward_iteration(mdp, tables.one_hot(mdp, [0] * mdp.size[0]))[0]
        h, width = np.random.default_rng(0).normal(size=mdp.size[0]), np.inf
        for _ in range(2000):
            h, lower, upper = average_reward.relative_sweep(mdp, h, step)
            assert lower - 1e-12 <= gain <= upper + 1e-12
            assert upper - lower <= width + 1e-12
            width = upper - lower
        assert width < 1e-9
    h = np.zeros(2)
    for _ in range(100):
        h, lower, upper = average_reward.relative_sweep(to_and_fro, h, 1.0)
    assert (lower, upper) == (1, 3)


@pytest.mark.peer
def test_the_gain_of_the_queue_is_that_of_its_linear_program():
    """min g such that g + h(s) ≥ R(s, a) + P h (Puterman, section 8.8); h(0) = 0. HiGHS drops what is below 1e-9."""
    optimize = pytest.importorskip("scipy.optimize")
    mdp = worlds.access_control()
    s, a = np.nonzero(mdp.allowed)
    rows = np.column_stack([-np.ones(len(s)), mdp.P[s, a] - np.eye(44)[s]])
    bounds = [(None, None), (0, 0)] + [(None, None)] * 43
    found = optimize.linprog([1.0] + [0.0] * 44, rows, -mdp.R[s, a], bounds=bounds)
    gain, _, policy, improvements = average_reward.average_reward_iteration(mdp, tables.one_hot(mdp, [0] * 44))
    assert found.status == 0
    assert gain == pytest.approx(found.fun, abs=1e-6)
    assert improvements <= 10
    accepted = policy[:, 1].reshape(11, 4)
    assert (np.diff(accepted, axis=0) >= 0).all(), "who is accepted is accepted with more servers free"
    assert (np.diff(accepted, axis=1) >= 0).all(), "and so is whoever pays more"
    assert accepted[1:, 3].all()


def test_discounted_values_lead_to_the_gain_and_the_bias():
    """V_γ = g / (1 − γ) + h + O(1 − γ)."""
    mdp = worlds.access_control()
    _, _, policy, _ = average_reward.average_reward_iteration(mdp, tables.one_hot(mdp, [0] * 44))
    gain, bias = average_reward.gain_and_bias(mdp, policy)
    apart = [
        abs(tables.solve(mdp.discounted(1 - rest), policy) - gain / rest - bias).max() for rest in (1e-2, 1e-3, 1e-4)
    ]
    assert apart[0] > 8 * apart[1] > 60 * apart[2]


def test_a_gain_that_depends_on_the_start_is_refused():
    apart = tables.make(np.eye(2)[:, None], [[1.0], [2.0]], 0.9, terminal=[False] * 2)
    with pytest.raises(UserError, match="not unichain"):
        average_reward.gain_and_bias(apart, tables.uniform(apart))


def test_what_a_sweep_shrinks():
    """Never by less than γ; by γ exactly where W = V + c; and with γ = 1 not at all."""
    for gamma in (0.0, 0.5, 0.95, 1.0):
        mdp = unichain(7, 3, 1).discounted(gamma)
        ratios = main.contraction_ratios(mdp, tables.uniform(mdp), 50, np.random.default_rng(2))
        assert ratios.max() <= gamma + 1e-9
        assert np.allclose(ratios[1::2], gamma, rtol=0, atol=1e-9)
        assert gamma == 0 or ratios[::2].max() < gamma


# --- Beliefs


def some_pomdp(states=3, actions=2, signs=2, seed=0):
    rng = np.random.default_rng(seed)
    P, observe = rng.dirichlet(np.ones(states), (states, actions)), rng.dirichlet(np.ones(signs), (actions, states))
    mdp = tables.make(P, rng.normal(size=(states, actions)), 0.9, terminal=[False] * states)
    return pomdp.POMDP(mdp, observe)


def plans(problem, steps):
    """The values (K, S) of every plan: an action, and for each observation a plan of one step less."""
    if steps == 0:
        return np.zeros((1, problem.mdp.size[0]))
    below, mdp, found = plans(problem, steps - 1), problem.mdp, []
    for a in range(mdp.size[1]):
        for after in itertools.product(below, repeat=problem.observe.shape[2]):
            found.append(mdp.R[:, a] + mdp.gamma * mdp.P[:, a] @ (problem.observe[a] * np.array(after).T).sum(1))
    return np.array(found)


@pytest.mark.parametrize(("problem", "steps"), [(pomdp.tiger(), 3), (some_pomdp(), 3), (some_pomdp(4, 3, 2, 1), 2)])
def test_the_vectors_are_the_best_of_all_plans(problem, steps):
    stage = pomdp.solve(problem, steps)[-1]
    beliefs = np.random.default_rng(0).dirichlet(np.full(problem.mdp.size[0], 0.5), 2000)
    every = plans(problem, steps)
    assert len(stage[0]) < len(every)
    assert np.allclose(pomdp.value(beliefs, stage), (beliefs @ every.T).max(1), rtol=0, atol=1e-7)


def test_a_margin_costs_what_it_says():
    """Five prunings a step with two observations, each of a margin at most."""
    beliefs = np.stack([np.linspace(0, 1, 501), np.linspace(1, 0, 501)], 1)
    exact, coarse = (pomdp.solve(pomdp.tiger(), 9, margin)[-1] for margin in (1e-11, 1e-4))  # of 100
    lost = pomdp.value(beliefs, exact) - pomdp.value(beliefs, coarse)
    assert len(coarse[0]) < len(exact[0])
    assert lost.min() >= -1e-7
    assert lost.max() <= 5 * 9 * 1e-2


def test_the_tigers_regions_are_those_that_were_published():
    """Kaelbling, Littman & Cassandra 1998, section 5: where the best plan of one and two steps changes, no discount."""
    b = np.linspace(0, 1, 100_001)
    stages = pomdp.solve(pomdp.tiger(1.0), 2)
    for (alphas, _), wanted in zip(stages, ((0.10, 0.90), (0.02, 0.39, 0.61, 0.98)), strict=True):
        best = (np.stack([b, 1 - b], 1) @ alphas.T).argmax(1)
        changes = np.flatnonzero(np.diff(best))
        assert np.allclose(b[changes], wanted, rtol=0, atol=0.0051)
    assert sorted(stages[0][1]) == [0, 1, 2]
    assert (stages[1][1] == 0).all(), "with two steps to go it listens"


def test_the_tigers_value_is_that_of_a_fine_grid_of_beliefs():
    """Value iteration over 2001 beliefs, interpolated: convex, so never below the truth."""
    problem, grid = pomdp.tiger(0.75), np.linspace(0, 1, 2001)
    beliefs, V = np.stack([grid, 1 - grid], 1), np.zeros(2001)
    for _ in range(40):
        V = np.max([beliefs @ problem.mdp.R[:, a] + 0.75 * sum(
            chance * np.interp(after[:, 0], grid, V)
            for after, chance in zip(*(np.moveaxis(x, 1, 0) for x in pomdp.update(problem, beliefs, a)), strict=True)
        ) for a in range(3)], axis=0)  # fmt: skip
    found = pomdp.value(beliefs, pomdp.solve(problem, 40, margin=1e-4)[-1])
    assert (found <= V + 1e-9).all()
    assert abs(found - V).max() < 0.01


def test_beliefs_are_what_counting_says():
    problem, rng = some_pomdp(), np.random.default_rng(3)
    before = rng.choice(3, 200_000, p=[0.5, 0.3, 0.2])
    after = tables.sample_next(problem.mdp, before, np.zeros(len(before), int), rng.random(len(before)))
    sign = tables.pick(problem.observe[0, after].cumsum(1), rng.random(len(before)))
    found, chance = pomdp.update(problem, np.array([0.5, 0.3, 0.2]), 0)
    for z in range(2):
        counted = np.bincount(after[sign == z], minlength=3) / (sign == z).sum()
        assert abs(chance[z] - (sign == z).mean()) < 0.006
        assert np.allclose(found[z], counted, rtol=0, atol=0.008)
    heard = pomdp.update(pomdp.tiger(), np.array([[0.5, 0.5]]), 0)[0][0]
    assert np.allclose(heard, [[0.85, 0.15], [0.15, 0.85]])


@pytest.mark.parametrize("seed", range(3))
def test_the_simulated_return_is_the_value(seed):
    for problem in (pomdp.tiger(), some_pomdp(seed=seed)):
        stages = pomdp.solve(problem, 5)
        returns, _ = pomdp.simulate(problem, stages, 10_000, np.random.default_rng(seed))
        value = pomdp.value(problem.mdp.start, stages[-1])
        assert abs(returns.mean() - value) < 3 * returns.std() / 100


def test_qmdp_promises_more_than_there_is_and_never_asks():
    mild = pomdp.tiger(penalty=-10.0)
    stages, promises = pomdp.solve(mild, 10, 1e-6), [pomdp.qmdp(mild, h) for h in range(1, 11)]
    beliefs = np.stack([np.linspace(0, 1, 101), np.linspace(1, 0, 101)], 1)
    for stage, promise in zip(stages, promises, strict=True):
        assert (pomdp.value(beliefs, promise) >= pomdp.value(beliefs, stage) - 1e-9).all()
    blind, taken = pomdp.simulate(mild, promises, 4000, np.random.default_rng(0))
    assert (taken != 0).all()
    assert abs(blind.mean()) < 4 * blind.std() / 4000**0.5, "every door is opened blindly: worth nothing"
    assert pomdp.value(mild.mdp.start, stages[-1]) > 10
    assert pomdp.value(mild.mdp.start, promises[-1]) > 70


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(3))
def test_the_belief_at_which_a_vector_is_best_is_scipys(seed):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    vector, others = rng.normal(size=4), rng.normal(size=(7, 4))
    belief, by = pomdp.largest_gap(vector, others)
    rows = np.column_stack([others - vector, np.ones(7)])  # δ ≤ b · (vector − other)
    found = optimize.linprog([0, 0, 0, 0, -1], rows, np.zeros(7), [[1, 1, 1, 1, 0]], [1], [(0, 1)] * 4 + [(None, None)])
    assert by == pytest.approx(-found.fun, abs=1e-9)
    assert ((vector - others) @ belief).min() == pytest.approx(by, abs=1e-9)
    assert belief.min() >= 0
    assert belief.sum() == pytest.approx(1)
