"""finetune.rl.envs.environments: spaces, what breaks gymnasium's contract, episodes that never end."""

import contextlib
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Text

from finetune.errors import UserError
from finetune.rl.envs import environments, logged_data
from finetune.rl.envs.vector import VectorEnv

UNIT = Box(-1, 1, (3,), np.float32)


class World(gymnasium.Env):
    """Ends after `length` steps; `gives` replaces parts of what a step returns, `begins` what a reset does."""

    def __init__(self, obs=UNIT, taken=None, length=5, gives=None, begins=None):
        self.observation_space, self.action_space = obs, taken or Discrete(2)
        self.length, self.gives, self.begins, self.taken = length, gives or {}, begins, []

    def observed(self):
        space = self.observation_space
        if isinstance(space, Discrete):
            return int(self.t % space.n + space.start)
        return np.zeros(space.shape, space.dtype) if isinstance(space, Box) else space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return (self.observed(), {}) if self.begins is None else self.begins

    def step(self, action):
        self.t += 1
        self.taken.append(action)
        usual = {"observation": self.observed(), "reward": 1.0, "terminated": self.t == self.length, "truncated": False}
        if callable(self.gives):
            return self.gives(self)
        return tuple((usual | {"info": {}} | self.gives).values())


@contextlib.contextmanager
def world(count=1, episode_limit=None, max_episode_steps=None, check=False, **kwargs):
    gymnasium.register("finetune/World-v0", World, kwargs=kwargs, max_episode_steps=max_episode_steps)
    try:
        yield environments.make("finetune/World-v0", count, episode_limit=episode_limit, check=check)
    finally:
        del gymnasium.registry["finetune/World-v0"]


def drawing(envs):
    g = torch.Generator().manual_seed(0)
    _, n, continuous = environments.sizes(envs[0])
    if continuous:
        return lambda obs: 5 * torch.randn(len(obs), n, generator=g)
    return lambda obs: torch.randint(n, (len(obs),), generator=g)


# --- Spaces


@pytest.mark.parametrize("start", [-2, 0, 1, 7])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_actions_are_those_of_the_space_wherever_it_starts(start, dtype):
    with world(2, taken=Discrete(3, start=start, dtype=dtype)) as envs:
        vector = VectorEnv(envs, 0)
        rollout = vector.collect(drawing(envs), 30)
        environments.play(envs, drawing(envs), [0, 1])
        assert set(rollout.actions.unique().tolist()) == {0, 1, 2}, "a policy counts from 0"
        for env in envs:
            taken = env.unwrapped.taken
            assert set(taken) == {start, start + 1, start + 2}
            assert {type(a) for a in taken} == {type(env.action_space.sample())}
        again = VectorEnv(envs, 0)
        again.load_state_dict(vector.state_dict())
        assert np.array_equal(again.observations, vector.observations)


@pytest.mark.parametrize("start", [-1, 0, 5])
def test_states_are_unit_vectors_wherever_they_start(start):
    with world(1, obs=Discrete(3, start=start)) as envs:
        rollout = environments.play(envs, drawing(envs), [0])
        assert rollout.observations[:, 0].argmax(-1).tolist() == [0, 1, 2, 0, 1]
        assert rollout.next_observations[:, 0].argmax(-1).tolist() == [1, 2, 0, 1, 2]
        assert (rollout.observations.sum(-1) == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8])
def test_continuous_actions_are_clipped_and_of_the_spaces_type(dtype):
    low, high = np.array([-3, 0], dtype), np.array([1, 2], dtype)
    with world(1, taken=Box(low, high, dtype=dtype)) as envs:
        VectorEnv(envs, 0).collect(drawing(envs), 60)
        taken = np.stack(envs[0].unwrapped.taken)
        assert taken.dtype == dtype
        assert all(envs[0].action_space.contains(a) for a in taken)
        assert (taken == low).any(0).all()
        assert (taken == high).any(0).all()


def test_a_log_counts_its_actions_as_its_environment_does(tmp_path):
    columns = {
        "observations": np.zeros((4, 3)), "next_observations": np.zeros((4, 3)), "rewards": np.ones(4),
        "terminations": np.zeros(4, bool), "truncations": np.zeros(4, bool),
    }  # fmt: skip
    with world(1, taken=Discrete(3, start=-1)) as envs:
        np.savez(tmp_path / "log.npz", actions=np.array([-1, 0, 1, -1]), **columns)
        assert logged_data.load(tmp_path / "log.npz").fit(envs[0]).actions.tolist() == [0, 1, 2, 0]
        np.savez(tmp_path / "log.npz", actions=np.array([-1, 0, 2, -1]), **columns)
        with pytest.raises(UserError, match=r"actions\[2\] is 2, finetune/World-v0 has -1 … 1"):
            logged_data.load(tmp_path / "log.npz").fit(envs[0])


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({"obs": Text(5)}, r"observations of Text\(1, 5, .*: Box, Discrete, MultiDiscrete, .* are taken"),
        ({"obs": Sequence(UNIT)}, "observations of Sequence"),
        ({"obs": Graph(UNIT, None)}, "observations of Graph"),
        ({"obs": Dict({"a": UNIT, "b": Text(3)})}, "observations of Text"),
        ({"obs": Box(0, 1, (0,), np.float32)}, "observations of 0 numbers"),
        ({"obs": Discrete(10**9)}, "observations of 1,000,000,000 numbers"),
        ({"taken": MultiDiscrete([100, 101])}, "actions of MultiDiscrete.*10,100 combinations, at most 10,000"),
        ({"taken": MultiBinary(14)}, "actions of MultiBinary.*16,384 combinations"),
        ({"taken": Dict({"a": UNIT, "b": Discrete(2)})}, "actions of Dict.*all discrete or all boxes"),
        ({"taken": Text(2)}, "actions of Text"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_other_spaces_are_refused_by_name(spaces, message, check):
    with pytest.raises(UserError, match=f"'finetune/World-v0' has {message}"), world(check=check, **spaces):
        pass


# --- The contract


class Tensorlike:
    shape = ()

    def item(self):
        return 2.5


@pytest.mark.parametrize("reward", [1, 2.5, True, np.float32(2.5), np.int8(3), np.array(2.5), Tensorlike()])
def test_rewards_of_every_numeric_type_are_taken(reward):
    with world(gives={"reward": reward}) as envs:
        found = environments.play(envs, drawing(envs), [0]).rewards
        assert found.dtype == torch.float32
        assert set(found.flatten().tolist()) == {float(getattr(reward, "item", lambda: reward)())}


SEEN = "gymnasium requires numbers of shape \\(3,\\)"
BROKEN = {
    "reward (1,)": ({"reward": np.array([1.0])}, "gave the reward .*shape \\(1,\\)\\): gymnasium requires one finite"),
    "reward None": ({"reward": None}, "gave the reward None"),
    "reward text": ({"reward": "1"}, "gave the reward '1' \\(str\\)"),
    "reward nan": ({"reward": math.nan}, "gave the reward nan"),
    "reward nan32": ({"reward": np.float32(np.nan)}, "gave the reward .*nan"),
    "reward inf": ({"reward": -math.inf}, "gave the reward -inf"),
    "reward of no float32": ({"reward": 1e300}, "gave the reward 1e\\+300"),
    "reward complex": ({"reward": 1j}, "gave the reward 1j"),
    "four values": (lambda w: (np.zeros(3), 1.0, False, {}), "returned 4 values .* from step: .*info; older"),
    "nothing": (lambda w: None, "returned None"),
    "six values": (lambda w: (np.zeros(3), 1.0, False, False, {}, 1), "returned 6 values"),
    "shape": ({"observation": np.zeros(4, np.float32)}, f"gave the observation .*{SEEN}"),
    "axes": ({"observation": np.zeros((3, 1))}, f"gave the observation .*{SEEN}"),
    "number": ({"observation": 1.0}, f"gave the observation 1.0 \\(float\\): {SEEN}"),
    "ragged": ({"observation": [1, [2], 3]}, f"gave the observation .*{SEEN}"),
    "objects": ({"observation": np.array([1, None, 2])}, f"gave the observation .*object of shape.*{SEEN}"),
    "complex": ({"observation": np.zeros(3, complex)}, f"gave the observation .*{SEEN}"),
    "dict": ({"observation": {"a": 1}}, f"gave the observation .*\\(dict\\): {SEEN}"),
    "nan": ({"observation": np.array([0, np.nan, 0])}, "gave an observation with nan at \\[1\\]"),
    "inf": ({"observation": np.array([0, 0, np.inf], np.float32)}, "gave an observation with inf at \\[2\\]"),
    "float64's": ({"observation": np.array([1e300, 0, 0])}, "gave an observation with 1e\\+300 at \\[0\\]"),
    "terminated": ({"terminated": None}, "gave None \\(NoneType\\) for terminated: gymnasium requires True or False"),
    "truncated": ({"truncated": {}}, "gave {} \\(dict\\) for truncated"),
    "terminated (1,)": ({"terminated": np.array([True])}, "gave .* for terminated"),
    "info": ({"info": None}, "gave None .*for info"),
    "exception": (lambda w: w.nothing, "raised AttributeError: .*nothing.*test_environments.py, line .*in its step"),
    "empty exception": (lambda w: [][0], "raised IndexError.* in its step"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_the_contract_is_named_at_that_step(case):
    gives, message = BROKEN[case]
    for run in (lambda envs: environments.play(envs, drawing(envs), [0]),
                lambda envs: VectorEnv(envs, 0).collect(drawing(envs), 3)):  # fmt: skip
        with world(gives=gives) as envs, pytest.raises(UserError, match=f"'finetune/World-v0' {message}") as caught:
            run(envs)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("begins", "message"),
    [
        (np.zeros(3), "returned .*from reset: gymnasium requires the first observation and a dict"),
        ((np.zeros(3), None), "returned 2 values .*from reset"),
        ((np.zeros(2), {}), "gave the observation .*shape \\(3,\\)"),
        ((np.full(3, np.nan), {}), "gave an observation with nan"),
    ],
)
def test_resets_are_checked_too(begins, message):
    with world(begins=begins) as envs, pytest.raises(UserError, match=message):
        VectorEnv(envs, 0)


def test_a_fault_that_comes_late_is_seen_and_what_is_huge_is_none():
    def late(w):
        obs = np.full(3, np.nan if w.t == 40 else 1e30, np.float32)
        return obs, 1.0, False, False, {}

    with world(gives=late) as envs:
        vector = VectorEnv(envs, 0)
        assert vector.collect(drawing(envs), 39).observations.max() == np.float32(1e30)
        with pytest.raises(UserError, match="observation with nan"):
            vector.collect(drawing(envs), 1)


def test_an_environment_without_spaces_or_seeds_is_refused():
    class Bare(gymnasium.Env):
        def reset(self):
            return 0, {}

    gymnasium.register("finetune/Bare-v0", Bare)
    with pytest.raises(UserError, match="'finetune/Bare-v0' has no observation_space: gymnasium requires one"):
        environments.make("finetune/Bare-v0", 1)
    Bare.observation_space = Bare.action_space = Discrete(2)
    with pytest.raises(UserError, match=r"raised TypeError: .*unexpected keyword argument 'seed'.* in its reset"):
        environments.make("finetune/Bare-v0", 1)
    (env,) = environments.make("finetune/Bare-v0", 1, check=False)
    with pytest.raises(UserError, match=r"raised TypeError: .*unexpected keyword argument 'seed'.* in its reset"):
        env.reset(seed=0)
    del gymnasium.registry["finetune/Bare-v0"]


def test_states_outside_of_their_space_are_refused():
    for state in (3, -1, 1.0, None, np.array([1])):
        message = r"gave the observation .*one integer of its space, 0 … 2"
        with world(obs=Discrete(3), gives={"observation": state}) as envs, pytest.raises(UserError, match=message):
            environments.play(envs, drawing(envs), [0])


def test_an_action_that_is_not_finite_is_the_policys_fault():
    with world(taken=Box(-1, 1, (2,))) as envs, pytest.raises(UserError, match=r"the policy's action .* became nan"):
        VectorEnv(envs, 0).collect(lambda obs: torch.full((len(obs), 2), torch.nan), 1)


def test_observations_that_the_environment_changes_later_are_copies():
    shared = np.zeros(3, np.float32)

    def gives(w):
        shared[0] = w.t
        return shared, 1.0, w.t == 4, False, {}

    with world(gives=gives) as envs:
        assert environments.play(envs, drawing(envs), [0]).next_observations[:, 0, 0].tolist() == [1, 2, 3, 4]


def test_modules_that_are_not_there_are_named(tmp_path, monkeypatch):
    (tmp_path / "broken_world.py").write_text("import no_such_thing\n")
    (tmp_path / "wrong_world.py").write_text("x = 1\ny = x.z\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        ("no_such_module:X-v0", "'no_such_module:X-v0': Python finds no module 'no_such_module'"),
        ("broken_world:X-v0", "cannot be made: ModuleNotFoundError: No module named 'no_such_thing' .*line 1"),
        ("wrong_world:X-v0", "cannot be made: AttributeError: .*wrong_world.py, line 2"),
        ("json:X-v0", "no environment 'json:X-v0'"),
    ):
        with pytest.raises(UserError, match=message):
            environments.make(name, 1)


# --- Without an end


def test_an_episode_without_a_time_limit_is_truncated_and_reported_once():
    reports = []
    limit = environments.EpisodeLimit(30, reports.append)
    with world(2, episode_limit=limit, length=10**9) as envs:
        assert limit.summary() == {}
        rollout = environments.play(envs, drawing(envs), [0, 1])
        assert len(rollout.rewards) == 30
        assert rollout.truncated[-1].all(), "something could have followed"
        assert not rollout.terminated.any()
        vector = VectorEnv(envs, 0)
        ends = vector.collect(drawing(envs), 95).truncated[:, 0].nonzero()[:, 0].tolist()
    assert ends == [29, 59, 89]
    assert limit.summary() == {"episodes_cut_off_at": 30.0}
    assert len(reports) == 1
    assert "'finetune/World-v0' has no time limit and an episode had not ended after 30 steps" in reports[0]
    resumed = environments.EpisodeLimit(30)
    resumed.load_state_dict(limit.state_dict())
    assert resumed.summary() == limit.summary()


@pytest.mark.parametrize(
    ("limit", "length", "steps", "reached"),
    [(7, 99, 7, False), (7, 5, 5, False), (50, 99, 50, False), (10**9, 99, 30, True)],
)
def test_an_environments_own_time_limit_is_kept_unless_it_is_huge(limit, length, steps, reached):
    fallback = environments.EpisodeLimit(30)
    with world(1, episode_limit=fallback, length=length, max_episode_steps=limit) as envs:
        assert len(environments.play(envs, drawing(envs), [0]).rewards) == steps
    assert fallback.reached == reached
