"""finetune.rl.mdp: exact values against enumeration and simulation, gymnasium's tables, files and what they refuse."""

import gymnasium
import numpy as np
import pytest

from finetune.errors import UserError
from finetune.rl import mdp as mdps


def random_mdp(states=7, actions=3, gamma=0.9, seed=0, terminal=1):
    draw = np.random.default_rng(seed)
    P = draw.dirichlet(np.full(states, 0.4), (states, actions))
    ends = np.arange(states) >= states - terminal
    return mdps.make(P, draw.normal(size=(states, actions, states)), gamma, terminal=ends)


def random_policy(mdp, seed=0):
    policy = np.random.default_rng(seed).exponential(size=mdp.size) * mdp.allowed
    return policy / policy.sum(1, keepdims=True)


# --- Exact values


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_values_are_those_of_the_definition(gamma):
    """V = Σ_t γ^t P_π^t R_π, summed until nothing is added."""
    mdp = random_mdp(gamma=gamma)
    policy = random_policy(mdp)
    P, r = mdps.under(mdp, policy)
    V, state, factor = np.zeros(len(r)), np.eye(len(r)), 1.0
    for _ in range(2000):
        V += factor * (state @ r)
        state, factor = state @ P, factor * gamma
    assert np.allclose(mdps.solve(mdp, policy), V, rtol=0, atol=1e-12)
    assert np.allclose((policy * mdps.action_values(mdp, V)).sum(1), V, rtol=0, atol=1e-12)
    assert np.allclose((policy * mdps.advantages(mdp, policy)).sum(1), 0, rtol=0, atol=1e-12)
    assert V[mdp.terminal] == 0


def test_performance_is_what_the_visits_earn():
    mdp = random_mdp()
    policy = random_policy(mdp)
    _, r = mdps.under(mdp, policy)
    assert mdps.visits(mdp, policy) @ r == pytest.approx(mdps.performance(mdp, policy), abs=1e-12)


def test_the_performance_difference_lemma():
    """J(π') − J(π) = Σ_s d^π'(s) Σ_a π'(a|s) A^π(s,a): Kakade & Langford 2002."""
    mdp = random_mdp()
    old, new = random_policy(mdp, 1), random_policy(mdp, 2)
    gain = mdps.visits(mdp, new) @ (new * mdps.advantages(mdp, old)).sum(1)
    assert gain == pytest.approx(mdps.performance(mdp, new) - mdps.performance(mdp, old), abs=1e-12)


def test_sampling_follows_the_table():
    mdp = random_mdp(states=5)
    draw = np.random.default_rng(0)
    count = 40_000
    states, actions = np.full(count, 2), np.full(count, 1)
    found = np.bincount(mdps.sample_next(mdp, states, actions, draw.random(count)), minlength=5) / count
    assert (abs(found - mdp.P[2, 1]) < 4 * np.sqrt(mdp.P[2, 1] * (1 - mdp.P[2, 1]) / count) + 1e-12).all()
    certain = mdps.make(np.eye(3)[None].repeat(3, 0), np.ones((3, 3)), 0.5)
    for u in (0.0, 0.5, np.nextafter(1, 0)):
        got = mdps.sample_next(certain, np.zeros(3, int), np.arange(3), np.full(3, u))
        assert got.tolist() == [0, 1, 2], "never a state of probability 0"


def test_a_policy_that_never_ends_is_refused_at_gamma_1():
    P = np.zeros((3, 2, 3))
    P[0, 0, 0] = P[0, 1, 1] = P[1, :, 2] = P[2, :, 2] = 1
    mdp = mdps.make(P, -np.ones((3, 2)) * [[1], [1], [0]], 1.0)
    assert mdp.terminal.tolist() == [False, False, True], "state 2 stays, for nothing"
    assert mdps.solve(mdp, mdps.uniform(mdp)).tolist() == [-3, -1, 0]
    with pytest.raises(UserError, match="does not end from state 0"):
        mdps.solve(mdp, mdps.one_hot(mdp, [0, 0, 0]))
    assert mdps.solve(mdp.discounted(0.5), mdps.one_hot(mdp, [0, 0, 0]))[0] == -2


def test_actions_that_are_not_allowed():
    mdp = random_mdp()
    allowed = mdp.allowed.copy()
    allowed[3, 1] = False
    P = mdp.P.copy()
    P[3, 1] = np.nan  # never looked at
    limited = mdps.make(P, mdp.rewards, 0.9, terminal=mdp.terminal, allowed=allowed)
    assert mdps.uniform(limited)[3].tolist() == [0.5, 0, 0.5]
    assert mdps.action_values(limited, np.zeros(7))[3, 1] == -np.inf
    assert np.isfinite(mdps.solve(limited, mdps.uniform(limited))).all()


# --- gymnasium's tables


@pytest.mark.parametrize(("name", "kwargs"), [("FrozenLake-v1", {}), ("CliffWalking-v1", {"is_slippery": True}),
                                              ("Taxi-v4", {})])  # fmt: skip
def test_gymnasiums_tables_are_its_steps(name, kwargs):
    """The empirical next states and rewards of the environment itself, one state and action after the other."""
    env = gymnasium.make(name, **kwargs).unwrapped
    mdp = mdps.from_gymnasium(name, 0.9, **kwargs)
    draw = np.random.default_rng(0)
    state, _ = env.reset(seed=0)
    for _ in range(400):
        action = int(draw.integers(mdp.size[1]))
        after, reward, done, _, _ = env.step(action)
        seen = after if mdp.P[state, action, after] else len(env.P)
        assert mdp.P[state, action, seen] > 0
        assert done == mdp.terminal[seen]
        if name != "CliffWalking-v1":  # at its start a slip may cost −1 or −100 and lead to the same state
            assert mdp.rewards[state, action, seen] == reward
        state = env.reset()[0] if done else after


def test_start_and_shape():
    lake = mdps.from_gymnasium("FrozenLake-v1", 0.99)
    assert lake.shape == (4, 4)
    assert lake.start[0] == 1
    assert lake.terminal.sum() == 5
    taxi = mdps.from_gymnasium("Taxi-v4", 1.0)
    assert np.count_nonzero(taxi.start) == 300
    with pytest.raises(UserError, match="no environment 'FrozenLage-v1'"):
        mdps.from_gymnasium("FrozenLage-v1", 0.9)
    with pytest.raises(UserError, match="'CartPole-v1' has no table"):
        mdps.from_gymnasium("CartPole-v1", 0.9)


# --- Files


def test_a_file_gives_the_same_mdp(tmp_path):
    mdp = random_mdp()
    mdps.save(mdp, tmp_path / "mdp.npz")
    again = mdps.load(tmp_path / "mdp.npz")
    for name in ("P", "R", "rewards", "gamma", "terminal", "start", "allowed"):
        assert np.array_equal(getattr(mdp, name), getattr(again, name)), name
    assert mdps.load(tmp_path / "mdp.npz", gamma=0.5).gamma == 0.5


BROKEN = {
    "one row": (lambda f: f["P"].__setitem__((3, 1), f["P"][3, 1] * 0.9), r"P\[3, 1\] sums to 0\.9, not to 1$"),
    "many rows": (lambda f: f["P"].__imul__(2), r"P\[0, 0\] sums to 2, not to 1; P\[0, 1\] .*; and 18 more"),
    "negative": (lambda f: f["P"].__setitem__((2, 0, slice(2)), (1.5, -0.5)), r"P\[2, 0\] holds a negative"),
    "nan": (lambda f: f["P"].__setitem__((2, 0, 1), np.nan), r"P\[2, 0\] holds a value that is not finite"),
    "reward": (lambda f: f["R"].__setitem__((4, 2, 1), np.nan), r"R\[4, 2\] is not finite"),
    "no R": (lambda f: f.pop("R"), "has no R: it needs P"),
    "no gamma": (lambda f: f.pop("gamma"), "has no gamma: give one with --gamma"),
    "gamma": (lambda f: f.update(gamma=1.5), "gamma 1.5 is not within 0 and 1"),
    "shape": (lambda f: f.update(R=f["R"][:, :2]), r"R has shape \(7, 2, 7\): with this P it must be \(7, 3\)"),
    "field": (lambda f: f.update(reward=0), "holds reward, which is none of P, R"),
    "text": (lambda f: f.update(R=np.array("x")), "R is not numeric"),
    "start": (lambda f: f.update(start=np.full(7, 0.1)), "start sums to 0.7, not to 1"),
    "terminal": (lambda f: f.update(terminal=np.zeros(3)), r"terminal has shape \(3,\): it must be \(7,\)"),
    "no action": (lambda f: f["allowed"].__setitem__(2, False), r"allowed\[2\] has no action"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_are_refused_row_by_row(tmp_path, case):
    change, message = BROKEN[case]
    mdp = random_mdp()
    file = {"P": mdp.P.copy(), "R": mdp.rewards.copy(), "gamma": 0.9, "allowed": mdp.allowed.copy()}
    if case in ("one row", "negative", "reward"):
        file["P"][:] = mdps.make(np.full((7, 3, 7), 1 / 7), np.zeros((7, 3)), 0.9).P
    change(file)
    np.savez(tmp_path / "mdp.npz", **file)
    with pytest.raises(UserError, match=message):
        mdps.load(tmp_path / "mdp.npz")


def test_what_is_no_file_of_arrays(tmp_path):
    for name, content in (("text.npz", b"P = 1"), ("empty.npz", b""), ("cut.npz", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is not an npz"):
            mdps.load(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        mdps.load(tmp_path / "none.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UserError, match="is one array"):
        mdps.load(tmp_path / "one.npy")
    np.savez(tmp_path / "cut.npz", P=np.eye(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:150])
    with pytest.raises(UserError, match="is not an npz"):
        mdps.load(tmp_path / "cut.npz")


def test_random_mdps_have_the_successors_and_the_end_that_were_asked_for():
    mdp = mdps.garnet(9, 2, 3, np.random.default_rng(0), 0.9, ending=0.1)
    assert ((mdp.P[:9] > 0).sum(2) == 4).all()
    assert np.allclose(mdp.P[:9, :, 9], 0.1)
    assert mdp.terminal.tolist() == [False] * 9 + [True]
    ring = mdps.garnet(9, 2, 3, np.random.default_rng(0), 0.9, reach=2).P
    assert ((ring > 0).sum(2) == 3).all()
    assert not ring[4, :, [0, 1, 7, 8]].any()
    assert not ring[0, :, 3:7].any()
    assert (mdps.garnet(9, 2, 9, np.random.default_rng(0), 0.9).P > 0).all()
    with pytest.raises(UserError, match="no random MDP has 3"):
        mdps.garnet(3, 2, 4, np.random.default_rng(0), 0.9)
