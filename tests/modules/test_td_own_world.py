"""td_learning in a world of one's own: by name, by file, by environment; known ones by exact values, others played."""

import dataclasses
import json

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Tuple
from seeds import THREE

from finetune import cli
from finetune.errors import UserError
from finetune.rl.tabular import mdp as tables
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("td_learning")
main = registry.load(INFO)
own_world = registry.part("td_learning", "own_world")
SMALL = {"steps": 3, "world_runs": 2, "world_steps": 600, "world_limit": 50, "checkpoint_every": 1}


def run(folder, **changes):
    return execute(INFO, dataclasses.replace(main.Config.toy(), **(SMALL | changes)), folder, toy=True)


def corridor(n=6):
    """States 0 … n in a row; action 1 goes right, 0 left; a step costs 1, and state n ends it."""
    P, R = np.zeros((n + 1, 2, n + 1)), -np.ones((n + 1, 2))
    for s in range(n):
        P[s, 0, max(s - 1, 0)] = P[s, 1, s + 1] = 1
    P[n, :, n] = 1
    return P, R, np.arange(n + 1) == n, np.eye(n + 1)[0]


class Hall(gymnasium.Env):
    """The corridor as an environment without a table. It shows its place as (tens, ones); of its two switches the
    second one counts."""

    def __init__(self, n=6):
        self.n = n
        self.observation_space = Tuple((Discrete(2, start=1), Discrete(10)))
        self.action_space = MultiDiscrete([2, 2])

    def seen(self):
        return self.at // 10 + 1, self.at % 10

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self.seen(), {}

    def step(self, action):
        assert action.shape == (2,)
        self.at = max(0, self.at + 2 * int(action[1]) - 1)
        return self.seen(), -1.0, self.at == self.n, False, {}


gymnasium.register("finetune/Hall-v0", Hall, max_episode_steps=60)


def test_a_world_from_a_file_is_learned_and_judged_by_its_exact_values(tmp_path, no_pictures):
    P, R, terminal, start = corridor()
    np.savez(tmp_path / "corridor.npz", P=P, R=R, gamma=1.0, terminal=terminal, start=start)
    summary = run(tmp_path / "run", data=tmp_path / "corridor.npz", world_steps=1500)
    assert summary["metrics"]["value_q_learning"] == pytest.approx(-6), "the shortest way"
    random = tables.make(P, R, 1.0, terminal=terminal, start=start)
    V = tables.evaluate(random, tables.uniform(random), np.zeros(7), 50)
    assert summary["baseline"]["value_q_learning"] == pytest.approx(V[0])
    checks = summary["checks"]
    assert checks["value_best"]["value"] == -6
    for kind in ("sarsa", "expected_sarsa", "double_q"):
        assert checks[f"value_{kind}"]["value"] > -15
    assert summary["metrics"]["error_td_0"] < 0.5 * summary["baseline"]["error_td_0"]


def test_nothing_is_learned_at_a_rate_of_0(tmp_path, no_pictures):
    summary = run(tmp_path / "run", world="frozen_lake", rate=0.0)
    assert summary["metrics"]["error_td_0"] == pytest.approx(summary["baseline"]["error_td_0"])
    assert summary["metrics"]["value_q_learning"] < 0.1


@pytest.mark.parametrize("seed", THREE)
def test_frozen_lake_is_learned_from_samples_alone(seed, tmp_path, no_pictures):
    summary = run(tmp_path / "run", world="frozen_lake", seed=seed, steps=4, world_steps=3000, world_limit=200)
    best, random = summary["checks"]["value_best"]["value"], summary["baseline"]["value_q_learning"]
    assert summary["metrics"]["value_q_learning"] > random + 0.6 * (best - random)


def test_a_world_without_a_table_is_played(tmp_path, no_pictures, capsys):
    summary = run(tmp_path / "run", world="finetune/Hall-v0", env_arg=("n=5",), gamma=1.0, world_steps=800)
    assert "has no table of transitions: values are estimated from episodes" in capsys.readouterr().out
    assert summary["metrics"]["return_q_learning"] == -5
    assert summary["baseline"]["return_q_learning"] < -12
    assert all(summary["checks"][f"return_{kind}"]["value"] >= -60 for kind in ("sarsa", "double_q"))


@pytest.mark.parametrize("world", ["frozen_lake", "finetune/Hall-v0"])
def test_a_cut_run_in_a_world_resumes_to_the_same_numbers(world, tmp_path, no_pictures, monkeypatch):
    changes = {"world": world, "world_steps": 150}
    whole = run(tmp_path / "whole", **changes)
    cfg = dataclasses.replace(main.Config.toy(), **(SMALL | changes))
    steps = iter(range(2 * 150))
    original = own_world.WorldLearners.step

    def step(self, rng):
        next(steps)
        return original(self, rng)

    with monkeypatch.context() as patch:
        patch.setattr(own_world.WorldLearners, "step", step)
        with pytest.raises(StopIteration):
            execute(INFO, cfg, tmp_path / "cut", toy=True)
    resumed = execute(INFO, cfg, tmp_path / "cut", toy=True, resume=True)
    assert resumed["metrics"] == whole["metrics"]
    assert (tmp_path / "cut/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


def test_arguments_come_from_the_command_line_are_kept_and_hold_at_resume(tmp_path, no_pictures, capsys):
    words = ["run", "td_learning", "--toy", "--world", "FrozenLake-v1", "--steps", "1", "--world-steps", "400"]
    folder = tmp_path / "run"
    assert cli.main([*words, "--env-arg", "is_slippery=false", "--env-arg=map_name=4x4", "--out", str(folder)]) == 0
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["env_arg"] == ["is_slippery=false", "map_name=4x4"]
    best = json.loads((folder / "summary.json").read_text())["checks"]["value_best"]["value"]
    assert best == pytest.approx(0.99**5), "no step slips: six of them to the goal"
    assert cli.main([*words, "--env-arg", "is_slippery=true", "--resume", "--out", str(folder)]) == 2
    assert "--env-arg ('is_slippery=true',): the run" in capsys.readouterr().err
    assert cli.main(["run", "td_learning", "--resume", "--out", str(folder)]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world": "a", "data": "b.npz"}, "--world and --data are two worlds"),
        ({"world": "taxi", "experiment": "dqn"}, "--experiment dqn has its own world"),
        ({"gamma": 0.9}, "--gamma is that of --world or --data"),
        ({"world": "gridworld", "env_arg": ("a=1",)}, "--env-arg a: 'gridworld' takes none"),
        ({"world": "Nowhere-v0"}, "gymnasium has no environment 'Nowhere-v0'.*the worlds here are"),
        ({"world": "CartPole-v1"}, "a table needs a finite space .*DQN learns from vectors: --env CartPole-v1"),
        ({"env": "Pendulum-v1"}, "'Pendulum-v1' has continuous actions: DQN's are discrete"),
    ],
)
def test_what_does_not_fit_is_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **changes)


def test_a_table_for_continuous_actions_is_refused(tmp_path):
    class Smooth(Hall):
        def __init__(self):
            super().__init__()
            self.action_space = Box(-1, 1, (2,))

        def step(self, action):
            return super().step(np.array([0, action[0] > 0]))

    gymnasium.register("finetune/Smooth-v0", Smooth)
    with pytest.raises(UserError, match=r"has continuous actions .*a table needs discrete ones"):
        run(tmp_path / "run", world="finetune/Smooth-v0")
    del gymnasium.registry["finetune/Smooth-v0"]


def test_dqn_trains_on_another_environment_alone(tmp_path, no_pictures):
    summary = run(tmp_path / "run", env="finetune/Hall-v0", steps=2, dqn_steps=1200, dqn_every=2, dqn_runs=1)
    assert set(summary["metrics"]) == {"return_all"}
    assert -60 <= summary["metrics"]["return_all"] <= -6
