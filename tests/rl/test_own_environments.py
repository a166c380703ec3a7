"""Environments of one's own: found by module, file or id, with arguments, and their contract checked first."""

import re
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from finetune.errors import UserError
from finetune.rl.envs import contract, creators, environments

FILE = '''
"""A walk on a line, as a class, as a function and as a registered id."""
import gymnasium, numpy as np
from gymnasium.spaces import Discrete, Box
from neighbor import LENGTH

class Walk(gymnasium.Env):
    def __init__(self, length=LENGTH, reward: float = 1.0, *, label="x"):
        self.length, self.reward, self.label = length, reward, label
        self.observation_space, self.action_space = Discrete(length), Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed); self.at = 0
        return self.at, {}
    def step(self, action):
        self.at = max(0, self.at + 2 * int(action) - 1)
        return self.at, self.reward, self.at == self.length - 1, False, {}

def short(**kwargs):
    return Walk(length=3, **kwargs)

class Needs(Walk):
    def __init__(self, size): super().__init__(size)

number = 3
gymnasium.register("Walk-v0", Walk, kwargs={"length": 4}, max_episode_steps=7)
'''


@pytest.fixture
def walks(tmp_path, monkeypatch):
    (tmp_path / "walks.py").write_text(FILE)
    (tmp_path / "neighbor.py").write_text("LENGTH = 6\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before, known = set(sys.modules), set(gymnasium.registry)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("walks", "neighbor") or name.startswith("finetune_environment"):
            del sys.modules[name]
    for name in set(gymnasium.registry) - known:
        del gymnasium.registry[name]


@pytest.mark.parametrize(
    ("name", "length", "limit"),
    [
        ("walks:Walk", 6, 1000),
        ("walks:short", 3, 1000),
        ("walks:Walk-v0", 4, 7),
        ("walks.py:Walk", 6, 1000),
        ("./walks.py:short", 3, 1000),
        ("walks.py:Walk-v0", 4, 7),
    ],
)
def test_a_module_or_file_and_a_class_function_or_id(walks, name, length, limit):
    envs = environments.make(name, 2)
    assert len(envs) == 2
    assert envs[0].unwrapped is not envs[1].unwrapped
    assert envs[0].unwrapped.length == length
    assert envs[0].limit == limit, "the time limit of a registered id"
    assert environments.make("walks:Walk", 1, args=["length=9", "label=8x8"])[0].unwrapped.length == 9


def test_a_module_in_the_current_folder_needs_no_path(walks, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(walks))])
    assert environments.make("walks:Walk", 1)[0].obs_dim == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("walks:Wolk", r"'walks' has nothing of this name: it has walks:Walk, walks:Needs; did you mean 'Walk'"),
        ("walks:number", "is int, neither a class nor a function"),
        ("walks.py", r"'walks.py' names no environment: it has walks.py:Walk"),
        ("none.py:Walk", "there is no file .*none.py"),
        ("walks:Needs", "'walks:Needs' needs size: --env-arg size=…; it takes size"),
        ("json:loads", "'json:loads' needs s: --env-arg"),
        ("nowhere:Walk", "Python finds no module 'nowhere'"),
    ],
)
def test_what_is_not_there_is_named(walks, name, message):
    with pytest.raises(UserError, match=message) as caught:
        environments.make(name, 1)
    assert "\n" not in str(caught.value)


def test_arguments_are_json_or_python_or_text():
    texts = [
        "a=false",
        "b=3",
        "c=0.5",
        "d=8x8",
        "e=[1,2]",
        "f=None",
        "g=(1, 'x')",
        "h=True",
        "i=",
        "j=x=y",
        'k={"a": 1}',
    ]
    assert creators.arguments(texts) == {
        "a": False, "b": 3, "c": 0.5, "d": "8x8", "e": [1, 2], "f": None, "g": (1, "x"), "h": True, "i": "", "j": "x=y",
        "k": {"a": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["is_slipery=false"], r"--env-arg is_slipery: .*it takes .*is_slippery.*; did you mean 'is_slippery'"),
        (["is_slippery"], "--env-arg 'is_slippery': write key=value"),
        (["a=1", "a=2"], "'a' is there twice"),
        (["max_episode_steps=3"], "none of the environment's own: use --max-episode-steps"),
        (["map_name=9x9"], r"cannot be made with map_name='9x9': KeyError: '9x9'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(args, message):
    with pytest.raises(UserError, match=message):
        environments.make("FrozenLake-v1", 1, args=args)


def test_arguments_reach_gymnasiums_environments():
    (env,) = environments.make("FrozenLake-v1", 1, args=["is_slippery=false", "map_name=8x8"])
    assert env.obs_dim == 64
    assert len(env.unwrapped.P[0][0]) == 1
    assert env.limit == 100


# --- The contract


class Broken(gymnasium.Env):
    """Breaks the contract in the ways that `faults` names."""

    observation_space, action_space = Box(-1, 1, (3,), np.float32), Discrete(2)

    def __init__(self, **faults):
        self.faults, self.resets = faults, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.resets = 0, self.resets + 1
        if "second reset" in self.faults and self.resets > 1:
            raise RuntimeError("no more")
        first = self.faults.get("first", np.zeros(3, np.float32))
        return (first, {}) if "bare reset" not in self.faults else first

    def step(self, action):
        self.t += 1
        noise = np.random.rand() if "unseeded" in self.faults else 0.0
        usual = {
            "observation": np.full(3, noise, self.faults.get("dtype", np.float32)),
            "reward": 1.0, "terminated": self.t == 5, "truncated": False, "info": {},
        }  # fmt: skip
        found = {key: self.faults.get(key, value) for key, value in usual.items()}
        if "four" in self.faults:
            del found["truncated"]
        return tuple(found.values())


BREACHES = {
    "reward": ({"reward": None}, ["gave the reward None"]),
    "observation": ({"observation": np.zeros(4, np.float32)}, ["gave the observation .*shape \\(3,\\)"]),
    "nan": ({"observation": np.array([0, np.nan, 0])}, ["gave an observation with nan at \\[1\\]"]),
    "bounds": ({"observation": np.array([0, 0, 7.5])}, ["7.5 at \\[2\\], outside of its space: .*-1 … 1 there: widen"]),
    "first": ({"first": np.ones(2)}, ["gave the observation"]),
    "bare reset": ({"bare reset": True}, ["returned .*from reset: gymnasium requires the first"]),
    "second reset": ({"second reset": True}, ["raised RuntimeError: no more .*in its reset after an episode"]),
    "flag": ({"terminated": 0}, ["gave 0 \\(int\\) for terminated"]),
    "info": ({"info": None}, ["for info"]),
    "four": ({"four": True}, ["returned 4 values .*from step"]),
    "several": (
        {"reward": "1", "info": [], "observation": np.zeros((3, 1)), "truncated": None},
        ["gave the reward '1'", "for truncated", "for info", "gave the observation"],
    ),
    "old and wrong": (
        {"four": True, "reward": np.ones(1), "observation": [1]},
        ["returned 4 values", "gave the reward", "gave the observation"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BREACHES)
def test_every_breach_is_named_before_training(case):
    faults, messages = BREACHES[case]
    gymnasium.register("finetune/Broken-v0", Broken, kwargs=faults)
    try:
        with pytest.raises(UserError, match=messages[0]) as caught:
            environments.make("finetune/Broken-v0", 1)
    finally:
        del gymnasium.registry["finetune/Broken-v0"]
    first, *lines = str(caught.value).splitlines()
    if len(messages) == 1:
        assert not lines
        lines = [first]
    else:
        assert first == f"'finetune/Broken-v0' breaks gymnasium's contract in {len(messages)} places:"
    assert len(lines) == len(messages)
    for message in messages:
        assert len([line for line in lines if re.search(message, line)]) == 1, message
    assert all("'finetune/Broken-v0' " in line for line in lines)
    assert all("gymnasium requires" in line or "raised" in line for line in lines)


def test_both_spaces_are_named_at_once():
    class Spaces(Broken):
        observation_space, action_space = gymnasium.spaces.Text(3), None

    breaches, _ = contract.check(Spaces())
    assert len(breaches) == 2
    assert breaches[0].startswith("has observations of Text")
    assert breaches[1].startswith("has no action_space")


def test_chance_without_the_seed_is_a_warning_and_so_is_another_dtype():
    said = []
    limit = environments.EpisodeLimit(report=said.append)
    gymnasium.register("finetune/Broken-v0", Broken, kwargs={"unseeded": True, "dtype": np.float64})
    try:
        (env,) = environments.make("finetune/Broken-v0", 1, episode_limit=limit)
        environments.make("finetune/Broken-v0", 1, episode_limit=limit)
    finally:
        del gymnasium.registry["finetune/Broken-v0"]
    assert not env.repeats
    assert len(said) == 2
    assert "float64 observations for a space of float32" in said[0]
    assert "does not repeat an episode from its seed" in said[1]
    assert contract.check(Broken()) == ([], [])


def test_parts_of_a_dict_are_named():
    class Parts(Broken):
        observation_space = Dict({"speed": Box(0, 1, (2,), np.float32), "gear": Discrete(3)})

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return {"speed": np.zeros(2, np.float32), "gear": 1}, {}

    def broken(observation):
        return contract.check(Parts(observation=observation))[0]

    assert broken({"speed": np.zeros(2, np.float32), "gear": 2}) == []
    assert "gave the observation['gear'] 3" in broken({"speed": np.zeros(2, np.float32), "gear": 3})[0]
    assert "2 at ['speed'][1], outside" in broken({"speed": np.array([0, 2], np.float32), "gear": 0})[0]
    assert "a dict with the keys" in broken({"speed": np.zeros(2, np.float32)})[0]


def test_the_check_is_made_once_and_its_environment_is_closed():
    made, closed = [], []

    class Counted(Broken):
        def __init__(self):
            super().__init__()
            made.append(self)

        def close(self):
            closed.append(self)

    gymnasium.register("finetune/Counted-v0", Counted)
    try:
        environments.make("finetune/Counted-v0", 2)
        environments.make("finetune/Counted-v0", 2)
    finally:
        del gymnasium.registry["finetune/Counted-v0"]
    assert len(made) == 5
    assert closed == made[:1]
