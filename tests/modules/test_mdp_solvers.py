"""The solvers of the mdp module and the named worlds: against scipy, quantecon, enumeration and the book."""

import itertools

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.runs import registry

value_iteration = registry.part("mdp", "value_iteration")
synchronous, in_place = value_iteration.synchronous, value_iteration.in_place
modified = registry.part("mdp", "modified_policy_iteration").modified
policy_iteration = registry.part("mdp", "policy_iteration").policy_iteration
linear_program = registry.part("mdp", "linear_program").linear_program

# V*(start) of gymnasium's tables; 14/17 is FrozenLake's without discount
KNOWN = {("frozen_lake", 0.99): 0.542026, ("frozen_lake", 1.0): 14 / 17, ("frozen_lake_8x8", 0.99): 0.414640,
         ("frozen_lake_8x8", 1.0): 1.0, ("cliff_walking", 1.0): -13.0, ("taxi", 1.0): 7.93,
         ("taxi", 0.99): 6.3275}  # fmt: skip


def random_mdp(states, actions, gamma, seed):
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(states, 0.3), (states, actions))
    allowed = rng.random((states, actions)) < 0.7
    allowed[:, 0] = True
    return tables.make(P, rng.normal(size=(states, actions)), gamma, allowed=allowed, terminal=[False] * states)


def best_of_all_policies(mdp):
    choices = [np.flatnonzero(row) for row in mdp.allowed]
    found = [tables.solve(mdp, tables.one_hot(mdp, list(actions))) for actions in itertools.product(*choices)]
    return np.max(found, axis=0)


@pytest.mark.parametrize("seed", range(5))
def test_every_solver_finds_the_best_of_all_policies(seed):
    mdp = random_mdp(5, 3, 0.9, seed)
    best = best_of_all_policies(mdp)
    V, policy, _ = policy_iteration(mdp)
    assert np.allclose(V, best, rtol=0, atol=1e-12)
    assert np.allclose(tables.solve(mdp, policy), best, rtol=0, atol=1e-12)
    V, policy, _ = linear_program(mdp)
    assert np.allclose(V, best, rtol=0, atol=1e-12)
    assert (policy * ~mdp.allowed).sum() == 0
    for sweep in (synchronous, in_place, modified):
        V, _ = value_iteration.iterate(sweep, mdp, 1e-10)
        assert abs(V - best).max() <= 1e-10 * abs(best).max(), "the tolerance is a promise"
    work = value_iteration.Prioritized(mdp, np.zeros(5))
    work.backups(3000)
    assert np.allclose(work.V, best, rtol=0, atol=1e-10)


@pytest.mark.parametrize("key", KNOWN, ids=str)
def test_known_values_of_gymnasiums_worlds(key):
    mdp = worlds.world(*key)
    V, policy, improvements = policy_iteration(mdp)
    assert mdp.start @ V == pytest.approx(KNOWN[key], abs=5e-7 if key != ("taxi", 0.99) else 5e-5)
    assert improvements <= 10
    assert tables.performance(mdp, policy) == pytest.approx(mdp.start @ V, abs=1e-9)


@pytest.mark.parametrize("name", ["frozen_lake", "frozen_lake_8x8", "taxi", "gambler"])
def test_every_solver_agrees_on_every_world(name):
    mdp = worlds.world(name)
    V, _, _ = policy_iteration(mdp)
    assert abs(synchronous(mdp, V) - V).max() < 1e-11 * max(1, abs(V).max()), "Bellman's equation"
    assert abs(linear_program(mdp)[0] - V).max() < 1e-10
    for sweep in (synchronous, in_place, modified):
        assert abs(value_iteration.iterate(sweep, mdp)[0] - V).max() < 1e-8, sweep


SCALES = (1e-12, 1e-10, 1e-8, 1e-3, 7.0, 1e8, 1e12)


def scaled(mdp, c):
    return tables.make(mdp.P, mdp.rewards * c, mdp.gamma, terminal=mdp.terminal, start=mdp.start, allowed=mdp.allowed)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.9999])
@pytest.mark.parametrize("c", SCALES)
def test_the_size_of_rewards_changes_no_policy(c, gamma):
    """By every solver: V scales with the rewards, and who acts does not change."""
    for mdp in (random_mdp(30, 4, gamma, 1), tables.garnet(20, 3, 2, np.random.default_rng(2), gamma, ending=0.1)):
        best, policy, improvements = policy_iteration(mdp)
        size, other = abs(best).max(), scaled(mdp, c)
        V, mine, count = policy_iteration(other)
        assert np.array_equal(mine, policy)
        assert count == improvements
        assert np.allclose(V / c, best, rtol=0, atol=1e-10 * size)
        V, mine, _ = linear_program(other)
        assert np.array_equal(mine[~mdp.terminal], policy[~mdp.terminal])
        assert np.allclose(V / c, best, rtol=0, atol=1e-10 * size)
        assert np.array_equal(tables.greedy(other, c * best), tables.greedy(mdp, best))
        assert np.array_equal(tables.greedy_actions(other, c * best, 1e-3), tables.greedy_actions(mdp, best, 1e-3))
        assert np.array_equal(value_iteration.finite_horizon(other, 9)[1], value_iteration.finite_horizon(mdp, 9)[1])
        if gamma < 0.99:
            for sweep in (synchronous, in_place, modified):
                V, mine = value_iteration.iterate(sweep, other)
                assert abs(V / c - best).max() <= 1e-10 * size
                assert mine == value_iteration.iterate(sweep, mdp)[1]
            work = value_iteration.Prioritized(other, np.zeros(len(best)))
            work.backups(5000)
            assert abs(work.V / c - best).max() <= 1e-10 * size


def test_small_numbers_count_next_to_large_ones():
    """A step may cost 1 or 2, and one action leads to ruin with 1e11: the tie is of the numbers that are compared."""
    P = np.zeros((3, 3, 3))
    P[0, 0, 1] = P[0, 1, 1] = P[0, 2, 2] = P[1, :, 1] = P[2, :, 2] = 1
    mdp = tables.make(P, [[-2.0, -1, -5], [0, 0, 0], [-1e11] * 3], 0.99, terminal=[False, True, False])
    for solver in (policy_iteration, linear_program):
        V, policy, _ = solver(mdp)
        assert V[0] == -1
        assert policy[0].tolist() == [0, 1, 0]


def test_sweeps_that_never_converge_say_what_is_missing():
    mdp = random_mdp(5, 2, 1 - 1e-9, 0)
    with pytest.raises(UserError, match=r"after 50 sweeps: γ = 0\.999999999 needs more"):
        value_iteration.iterate(synchronous, mdp, max_sweeps=50)


@pytest.mark.parametrize("name", ["frozen_lake", "gridworld", "car_rental"])
def test_sweeps_contract(name):
    """‖V_k − V*‖ ≤ γ^k ‖V_0 − V*‖ at each sweep, from values that are wrong in both directions."""
    mdp = worlds.world(name)
    best, _, _ = policy_iteration(mdp)
    rng = np.random.default_rng(0)
    uniform, first = tables.uniform(mdp), np.where(mdp.terminal, 0, best + rng.normal(size=len(best)) * 10)
    own = tables.solve(mdp, uniform)
    for sweep, goal in ((synchronous, best), (in_place, best),
                        (lambda m, V: in_place(m, V, rng.permutation(len(V))), best),
                        (lambda m, V: tables.evaluate(m, uniform, V), own)):  # fmt: skip
        V, bound = first, abs(first - goal).max()
        for _ in range(60):
            V, bound = sweep(mdp, V), bound * mdp.gamma
            assert abs(V - goal).max() <= bound * (1 + 1e-12)


def test_priorities_bound_the_bellman_error():
    mdp = random_mdp(20, 3, 0.95, 3)
    work = value_iteration.Prioritized(mdp, np.zeros(20))
    for _ in range(200):
        work.backups(1)
        assert (abs(synchronous(mdp, work.V) - work.V) <= work.priority + 1e-12).all()


def test_modified_policy_iteration_lies_between():
    mdp = worlds.world("frozen_lake")
    V = synchronous(mdp, np.zeros(16))
    assert np.array_equal(modified(mdp, V, 1), synchronous(mdp, V))
    policy = tables.greedy(mdp, V)
    assert np.allclose(modified(mdp, V, 5000), tables.solve(mdp, policy), rtol=0, atol=1e-12)


def test_finite_horizon_is_the_best_of_all_plans():
    """Three steps by enumerating what may be done in each; many steps by value iteration."""
    mdp = random_mdp(3, 2, 1.0, 1)
    V, actions = value_iteration.finite_horizon(mdp, 3)
    rules = list(itertools.product(*[np.flatnonzero(row) for row in mdp.allowed]))
    index = np.arange(3)

    def worth(plan):
        value = np.zeros(3)
        for rule in reversed(plan):
            value = mdp.R[index, rule] + mdp.P[index, rule] @ value
        return value

    best = np.max([worth(plan) for plan in itertools.product(rules, repeat=3)], axis=0)
    assert np.allclose(V[3], best, rtol=0, atol=1e-12)
    assert np.allclose(worth([actions[2], actions[1], actions[0]]), best, rtol=0, atol=1e-12)
    lake = worlds.world("frozen_lake")
    far, _ = value_iteration.finite_horizon(lake, 2000)
    assert np.allclose(far[-1], policy_iteration(lake)[0], rtol=0, atol=1e-8)


# --- Peers


def as_quantecon(mdp):
    DiscreteDP = pytest.importorskip("quantecon.markov").DiscreteDP
    return DiscreteDP(np.where(mdp.allowed, mdp.R, -np.inf), mdp.P, mdp.gamma)


@pytest.mark.peer
@pytest.mark.parametrize(("name", "gamma"), [("frozen_lake", 0.99), ("frozen_lake_8x8", 0.99), ("taxi", 0.99),
                                             ("car_rental", 0.9), ("gridworld", 0.9)])  # fmt: skip
def test_values_equal_quantecons(name, gamma):
    mdp = worlds.world(name, gamma)
    theirs = as_quantecon(mdp).solve("policy_iteration", v_init=np.zeros(mdp.size[0]))
    assert abs(policy_iteration(mdp)[0] - theirs.v).max() < 1e-8


@pytest.mark.peer
@pytest.mark.parametrize(("name", "gamma"), [("frozen_lake", 0.99), ("frozen_lake", 1.0), ("frozen_lake_8x8", 0.99),
                                             ("cliff_walking", 1.0), ("gambler", 1.0), ("taxi", 1.0)])  # fmt: skip
def test_values_equal_scipys_linear_program(name, gamma):
    optimize = pytest.importorskip("scipy.optimize")
    sparse = pytest.importorskip("scipy.sparse")
    mdp = worlds.world(name, gamma)
    inner = np.flatnonzero(~mdp.terminal)
    s, a = np.nonzero(mdp.allowed[inner])
    rows = mdp.gamma * mdp.P[inner[s], a][:, inner] - np.eye(len(inner))[s]
    within = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = optimize.linprog(np.ones(len(inner)), sparse.csr_array(rows), -mdp.R[inner[s], a], bounds=(None, None),
                             options=within)  # fmt: skip
    assert found.status == 0
    assert abs(linear_program(mdp)[0][inner] - found.x).max() < 1e-8


# --- The book


def test_examples_3_5_and_3_8():
    mdp = worlds.gridworld()
    assert abs(tables.solve(mdp, tables.uniform(mdp)) - worlds.EXAMPLE_3_5.ravel()).max() <= 0.05
    assert abs(policy_iteration(mdp)[0] - worlds.EXAMPLE_3_8.ravel()).max() <= 0.05


def test_figure_4_1():
    mdp = worlds.small_gridworld()
    V, sweeps = np.zeros(16), 0
    for k, table in worlds.FIGURE_4_1.items():
        if np.isfinite(k):
            V, sweeps = tables.evaluate(mdp, tables.uniform(mdp), V, int(k) - sweeps), int(k)
        else:
            V = tables.solve(mdp, tables.uniform(mdp))
        assert abs(V - table.ravel()).max() < 0.0501, "the book cuts −1.75 to −1.7"


def test_figure_4_2_needs_four_improvements():
    """From never moving a car; every policy moves as many cars as the figure's last one in its upper left."""
    mdp = worlds.car_rental()
    V, policy, improvements = policy_iteration(mdp, tables.one_hot(mdp, np.full(441, 5)))
    assert improvements == 4
    cars = policy.argmax(1).reshape(21, 21) - 5
    assert cars[20].tolist() == [5, 5, 5, 5, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert cars[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -2, -2, -2, -3, -3, -3, -3, -3, -4, -4, -4]
    assert (np.diff(V.reshape(21, 21), axis=0) > 0).all(), "a car more is worth something"


def test_a_day_of_the_car_rental_is_what_simulation_says():
    day, rented = worlds._one_location(20, 3, 2)
    assert np.allclose(day.sum(1), 1, rtol=0, atol=1e-12)
    rng = np.random.default_rng(0)
    count = 200_000
    out = np.minimum(rng.poisson(3, count), 6)
    left = np.minimum(6 - out + rng.poisson(2, count), 20)
    assert abs(out.mean() - rented[6]) < 5 * out.std() / count**0.5
    seen = np.bincount(left, minlength=21) / count
    assert (abs(seen - day[6]) < 5 * np.sqrt(day[6] / count) + 1e-5).all()


@pytest.mark.parametrize("heads", [0.25, 0.4])
def test_the_gambler_plays_boldly(heads):
    """With odds below even, V(s) = p V(2s) up to half of the goal, p + (1 − p) V(2s − goal) from there."""
    mdp = worlds.gambler(heads=heads)
    V, _, _ = policy_iteration(mdp)
    s = np.arange(1, 51)
    assert np.allclose(V[s], heads * np.where(2 * s == 100, 1, V[2 * s]), rtol=0, atol=1e-12)
    s = np.arange(51, 100)
    assert np.allclose(V[s], heads + (1 - heads) * V[2 * s - 100], rtol=0, atol=1e-12)


def test_random_walk_values():
    """k/6 with 5 states; from −1 to 1 in equal steps with 19."""
    five = worlds.random_walk()
    assert np.allclose(tables.solve(five, tables.uniform(five)), [0, *np.arange(1, 6) / 6, 0], rtol=0, atol=1e-14)
    many = worlds.random_walk(19, -1.0, 1.0)
    assert np.allclose(tables.solve(many, tables.uniform(many))[1:-1], np.arange(-9, 10) / 10, rtol=0, atol=1e-14)


# --- What has no answer


def test_values_without_a_bound_are_refused():
    P = np.zeros((3, 2, 3))
    P[0, 0, 1] = P[1, 0, 0] = 1  # to and fro, paid
    P[0, 1, 2] = P[1, 1, 2] = P[2, :, 2] = 1
    mdp = tables.make(P, [[1, 0], [1, 0], [0, 0]], 1.0)
    with pytest.raises(UserError, match="no bound"):
        linear_program(mdp)
    with pytest.raises(UserError, match="does not end"):
        policy_iteration(mdp)
    with pytest.raises(UserError, match="no limit"):
        value_iteration.iterate(synchronous, mdp, max_sweeps=100)
    endless = tables.make(np.ones((2, 1, 2)) / 2, np.ones((2, 1)), 1.0)
    with pytest.raises(UserError, match="does not end from state 0"):
        policy_iteration(endless)


def test_unknown_world():
    with pytest.raises(UserError, match=r"no environment 'frozen_lke'.*did you mean 'frozen_lake'"):
        worlds.world("frozen_lke")
