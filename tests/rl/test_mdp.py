"""rl.tabular.mdp: exact values against enumeration and simulation, gymnasium's tables, files and what they refuse."""

import gymnasium
import numpy as np
import pytest

from finetune.errors import UserError
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.gymnasium_tables import from_gymnasium


def random_mdp(states=7, actions=3, gamma=0.9, seed=0, terminal=1):
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(states, 0.4), (states, actions))
    ends = np.arange(states) >= states - terminal
    return tables.make(P, rng.normal(size=(states, actions, states)), gamma, terminal=ends)


def random_policy(mdp, seed=0):
    policy = np.random.default_rng(seed).exponential(size=mdp.size) * mdp.allowed
    return policy / policy.sum(1, keepdims=True)


# --- Exact values


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_values_are_those_of_the_definition(gamma):
    """V = Σ_t γ^t P_π^t R_π, summed until nothing is added."""
    mdp = random_mdp(gamma=gamma)
    policy = random_policy(mdp)
    P, r = tables.under(mdp, policy)
    V, state, factor = np.zeros(len(r)), np.eye(len(r)), 1.0
    for _ in range(2000):
        V += factor * (state @ r)
        state, factor = state @ P, factor * gamma
    assert np.allclose(tables.solve(mdp, policy), V, rtol=0, atol=1e-12)
    assert np.allclose((policy * tables.action_values(mdp, V)).sum(1), V, rtol=0, atol=1e-12)
    assert np.allclose((policy * tables.advantages(mdp, policy)).sum(1), 0, rtol=0, atol=1e-12)
    assert V[mdp.terminal] == 0


def test_performance_is_what_the_visits_earn():
    mdp = random_mdp()
    policy = random_policy(mdp)
    _, r = tables.under(mdp, policy)
    assert tables.visits(mdp, policy) @ r == pytest.approx(tables.performance(mdp, policy), abs=1e-12)


def test_the_performance_difference_lemma():
    """J(π') − J(π) = Σ_s d^π'(s) Σ_a π'(a|s) A^π(s,a): Kakade & Langford 2002."""
    mdp = random_mdp()
    old, new = random_policy(mdp, 1), random_policy(mdp, 2)
    gain = tables.visits(mdp, new) @ (new * tables.advantages(mdp, old)).sum(1)
    assert gain == pytest.approx(tables.performance(mdp, new) - tables.performance(mdp, old), abs=1e-12)


def test_sampling_follows_the_table(monkeypatch):
    mdp = random_mdp(states=5)
    rng = np.random.default_rng(0)
    count = 40_000
    states, actions = np.full(count, 2), np.full(count, 1)
    found = np.bincount(tables.sample_next(mdp, states, actions, rng.random(count)), minlength=5) / count
    assert (abs(found - mdp.P[2, 1]) < 4 * np.sqrt(mdp.P[2, 1] * (1 - mdp.P[2, 1]) / count) + 1e-12).all()
    whole = tables.sample_next(mdp, states, actions, uniforms := rng.random(count))
    monkeypatch.setattr(tables, "CHUNK", 5 * 999)  # in pieces
    assert np.array_equal(tables.sample_next(mdp, states, actions, uniforms), whole)
    assert tables.sample_next(mdp, states[:0], actions[:0], uniforms[:0]).shape == (0,)
    certain = tables.make(np.eye(3)[None].repeat(3, 0), np.ones((3, 3)), 0.5)
    for u in (0.0, 0.5, np.nextafter(1, 0)):
        got = tables.sample_next(certain, np.zeros(3, int), np.arange(3), np.full(3, u))
        assert got.tolist() == [0, 1, 2], "never a state of probability 0"


def test_a_policy_that_never_ends_is_refused_at_gamma_1():
    P = np.zeros((3, 2, 3))
    P[0, 0, 0] = P[0, 1, 1] = P[1, :, 2] = P[2, :, 2] = 1
    mdp = tables.make(P, -np.ones((3, 2)) * [[1], [1], [0]], 1.0)
    assert mdp.terminal.tolist() == [False, False, True], "state 2 stays, for nothing"
    assert tables.solve(mdp, tables.uniform(mdp)).tolist() == [-3, -1, 0]
    with pytest.raises(UserError, match="does not end from state 0"):
        tables.solve(mdp, tables.one_hot(mdp, [0, 0, 0]))
    assert tables.solve(mdp.discounted(0.5), tables.one_hot(mdp, [0, 0, 0]))[0] == -2


def test_actions_that_are_not_allowed():
    mdp = random_mdp()
    allowed = mdp.allowed.copy()
    allowed[3, 1] = False
    P = mdp.P.copy()
    P[3, 1] = np.nan  # never looked at
    limited = tables.make(P, mdp.rewards, 0.9, terminal=mdp.terminal, allowed=allowed)
    assert tables.uniform(limited)[3].tolist() == [0.5, 0, 0.5]
    assert tables.action_values(limited, np.zeros(7))[3, 1] == -np.inf
    assert np.isfinite(tables.solve(limited, tables.uniform(limited))).all()


# --- gymnasium's tables


@pytest.mark.parametrize(("name", "kwargs"), [("FrozenLake-v1", {}), ("CliffWalking-v1", {"is_slippery": True}),
                                              ("Taxi-v4", {})])  # fmt: skip
def test_gymnasiums_tables_are_its_steps(name, kwargs):
    """The empirical next states and rewards of the environment itself, one state and action after the other."""
    env = gymnasium.make(name, **kwargs).unwrapped
    mdp = from_gymnasium(name, 0.9, **kwargs)
    rng = np.random.default_rng(0)
    state, _ = env.reset(seed=0)
    for _ in range(400):
        action = int(rng.integers(mdp.size[1]))
        after, reward, done, _, _ = env.step(action)
        seen = after if mdp.P[state, action, after] else len(env.P)
        assert mdp.P[state, action, seen] > 0
        assert done == mdp.terminal[seen]
        if name != "CliffWalking-v1":  # at its start a slip may cost −1 or −100 and lead to the same state
            assert mdp.rewards[state, action, seen] == reward
        state = env.reset()[0] if done else after


def test_start_and_shape():
    lake = from_gymnasium("FrozenLake-v1", 0.99)
    assert lake.shape == (4, 4)
    assert lake.start[0] == 1
    assert lake.terminal.sum() == 5
    taxi = from_gymnasium("Taxi-v4", 1.0)
    assert np.count_nonzero(taxi.start) == 300
    with pytest.raises(UserError, match="no environment 'FrozenLage-v1'"):
        from_gymnasium("FrozenLage-v1", 0.9)
    with pytest.raises(UserError, match="'CartPole-v1' has no table"):
        from_gymnasium("CartPole-v1", 0.9)


# --- Files


def test_a_file_gives_the_same_mdp(tmp_path):
    mdp = random_mdp()
    tables.save(mdp, tmp_path / "mdp.npz")
    again = tables.load(tmp_path / "mdp.npz")
    for name in ("P", "R", "rewards", "gamma", "terminal", "start", "allowed"):
        assert np.array_equal(getattr(mdp, name), getattr(again, name)), name
    assert tables.load(tmp_path / "mdp.npz", gamma=0.5).gamma == 0.5


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
    "two decimals": (
        lambda f: f["P"].__setitem__(slice(None), [1 / 3] * 3 + [0] * 4) or f["P"].round(2, f["P"]),
        r"P\[0, 0\] sums to 0\.99, not to 1;.*: if they were rounded, divide each row by its sum",
    ),
    "just off": (lambda f: f["P"].__setitem__((3, 1), f["P"][3, 1] * (1 + 2e-9)), r"sums to 1\.0000000019\d+, not"),
    "empty row": (lambda f: f["P"].__setitem__((2, 0), 0), r"P\[2, 0\] is empty: .* say so with `allowed`"),
    "no such action": (
        lambda f: f.update(R=np.where(np.arange(3) == 1, -np.inf, np.zeros((7, 3)))),
        r"R\[0, 1\] is −inf.*say so with `allowed`",
    ),
    "huge": (lambda f: f["R"].__setitem__((4, 2), 1e200), r"R\[4, 2\] is beyond ±1e\+100"),
    "flags": (lambda f: f.update(terminal=np.full(7, 0.5)), r"terminal\[0\] is neither 0 nor 1"),
    "no action": (lambda f: f["allowed"].__setitem__(2, False), r"allowed\[2\] has no action"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_are_refused_row_by_row(tmp_path, case):
    change, message = BROKEN[case]
    mdp = random_mdp()
    file = {"P": mdp.P.copy(), "R": mdp.rewards.copy(), "gamma": 0.9, "allowed": mdp.allowed.copy()}
    if case in ("one row", "negative", "reward"):
        file["P"][:] = tables.make(np.full((7, 3, 7), 1 / 7), np.zeros((7, 3)), 0.9).P
    change(file)
    np.savez(tmp_path / "mdp.npz", **file)
    with pytest.raises(UserError, match=message):
        tables.load(tmp_path / "mdp.npz")


SHARP = np.random.default_rng(0).dirichlet(np.full(50, 0.2), (50, 3))
THIRDS = np.full((3, 2, 3), 1 / 3)


@pytest.mark.parametrize(
    ("P", "within"),
    [
        (SHARP.astype(np.float32), 1e-6),
        (SHARP.astype(np.float16), 1e-3),
        (THIRDS.astype(np.float32), 1e-6),
        (SHARP.round(6), 5e-6),
        (THIRDS.round(4), 2e-4),
        (SHARP.round(8).astype(np.float32), 1e-6),
    ],
)
def test_rounded_rows_are_normalized_and_reported_once(tmp_path, P, within):
    """To a type, or to decimals: then they are divided by their sums."""
    np.savez(tmp_path / "mdp.npz", P=P, R=np.arange(len(P) * P.shape[1]).reshape(P.shape[:2]), gamma=0.9)
    reported = []
    mdp = tables.load(tmp_path / "mdp.npz", report=reported.append)
    assert abs(mdp.P.sum(2) - 1).max() < 1e-14
    assert abs(mdp.P - P).max() < within
    assert len(reported) == 1
    assert "divided by its sum" in reported[0]


def test_rounding_does_not_cover_errors():
    for wrong, type_ in ((SHARP * (1 + 3e-5), np.float32), (SHARP * (1 + 2e-9), np.float64)):
        with pytest.raises(UserError, match=r"P\[0, 0\] sums to (?!1,).*, not to 1"):
            tables.make(wrong.astype(type_), np.zeros((50, 3)), 0.9)
    with pytest.raises(UserError, match=r"sums to 0\.997, not to 1"):
        tables.make(np.array([[[0.5, 0.497], [0.5, 0.5]]] * 2), np.zeros((2, 2)), 0.9)
    assert tables.make(SHARP, np.zeros((50, 3)), 0.9).rounding == 0


def test_a_table_of_gymnasium_that_is_wrong_is_refused():
    import gymnasium

    def of(table, start=0):
        env = gymnasium.Env()
        env.observation_space, env.action_space = (
            gymnasium.spaces.Discrete(2, start=start),
            gymnasium.spaces.Discrete(1),
        )
        env.P = table
        return from_gymnasium(env, 0.9)

    counted = of({1: {0: [(1.0, 2, 3.0, False)]}, 2: {0: [(1.0, 2, 0.0, True)]}}, start=1)
    assert counted.R.tolist() == [[3.0], [0.0]], "states are counted from 0"
    for table, message in (
        ({0: {0: [(0.4, 0, 0.0, False)]}, 1: {0: [(1.0, 1, 0.0, True)]}}, r"P\[0, 0\] sums to 0\.4, not to 1"),
        ({0: {0: [(1.0, 5, 0.0, False)]}, 1: {0: []}}, "the next state 5 is none of 2"),
        ({0: {0: [(1.0, 0)]}, 1: {0: []}}, "its table P is not"),
        ({0: [1], 1: [2]}, "its table P is not"),
        ({}, "its table P is not"),
    ):
        with pytest.raises(UserError, match=message):
            of(table)


def test_what_is_no_file_of_arrays(tmp_path):
    for name, content in (("text.npz", b"P = 1"), ("empty.npz", b""), ("cut.npz", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is not an npz"):
            tables.load(tmp_path / name)
    with pytest.raises(UserError, match="there is no such file"):
        tables.load(tmp_path / "none.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UserError, match="is one array"):
        tables.load(tmp_path / "one.npy")
    np.savez(tmp_path / "cut.npz", P=np.eye(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:150])
    with pytest.raises(UserError, match="is not an npz"):
        tables.load(tmp_path / "cut.npz")


def test_random_mdps_have_the_successors_and_the_end_that_were_asked_for():
    mdp = tables.garnet(9, 2, 3, np.random.default_rng(0), 0.9, ending=0.1)
    assert ((mdp.P[:9] > 0).sum(2) == 4).all()
    assert np.allclose(mdp.P[:9, :, 9], 0.1)
    assert mdp.terminal.tolist() == [False] * 9 + [True]
    ring = tables.garnet(9, 2, 3, np.random.default_rng(0), 0.9, reach=2).P
    assert ((ring > 0).sum(2) == 3).all()
    assert not ring[4, :, [0, 1, 7, 8]].any()
    assert not ring[0, :, 3:7].any()
    assert (tables.garnet(9, 2, 9, np.random.default_rng(0), 0.9).P > 0).all()
    with pytest.raises(UserError, match="no random MDP has 3"):
        tables.garnet(3, 2, 4, np.random.default_rng(0), 0.9)
