"""Deep RL from pixels: every algorithm with convolutions learns, the others refuse images."""

import dataclasses

import gymnasium
import pytest
import torch
from small_games import Catch

from finetune.errors import UserError
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.vector import VectorEnv
from finetune.runs import registry
from finetune.runs.run import execute

actor_critic = registry.load(registry.find("actor_critic"))
registry.load(registry.find("td_learning"))
dqn = registry.part("td_learning", "dqn")
NAME = "finetune/Catch-v0"


@pytest.fixture(autouse=True)
def catch():
    gymnasium.register(NAME, Catch)
    yield
    del gymnasium.registry[NAME]


def mean_return(policy, count=50):
    return sum(returns(environments.make(NAME, count), policy, range(count))) / count


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a2c_learns_from_pixels(seed):
    """Random actions get 1.0 ± 0.1, the best ones 5.9; six seeds gave 3.6 to 5.8."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    agent = actor_critic.A2C(actor_critic.Config.toy(), VectorEnv(environments.make(NAME, 8), seed))
    assert mean_return(lambda obs: agent.act(obs, rng)) < 1.8
    agent.train_for(16_000, 1.0, rng)
    assert mean_return(agent.greedy) > 2.5


def test_dqn_learns_from_pixels():
    """Three learners in lockstep, each with convolutions of its own."""
    torch.manual_seed(0)
    settings = dqn.Settings(every=4, warmup=300, batch=64)
    learner = dqn.DQN(dqn.VARIANTS["double"], VectorEnv(environments.make(NAME, 12), 0), 3, settings)
    test = environments.make(NAME, 90)
    learner.train(2000, 0.0, 1.0, 1.0, torch.Generator().manual_seed(0))
    found = learner.evaluate(test, range(90))
    assert found.mean() > 2
    assert found.min() > 1.2


SMALL = {
    "actor_critic": {"env": NAME, "methods": "one_step,a2c,vtrace", "repeats": 1, "critic_steps": 1, "freeze_after": 1,
                     "critic_states": 4, "critic_episodes": 2, "eval_episodes": 2},
    "policy_gradient": {"env": NAME, "methods": "reinforce,natural,trpo", "episodes": 4, "eval_episodes": 2,
                        "corridor_steps": 0, "score_episodes": 1000, "variance_groups": 10},
    "gae": {"ppo_env": NAME, "ppo_updates": 2, "ppo_lams": "0.95", "samples": 2, "bench_steps": 8, "bench_rows": 2,
            "ppo_horizon": 16},
    "td_learning": {"env": NAME, "dqn_steps": 1200, "variants": "all", "dqn_runs": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_run_says_what_its_images_are(name, tmp_path, no_pictures, capsys):
    info = registry.find(name)
    cfg = dataclasses.replace(registry.load(info).Config.toy(), steps=2, checkpoint_every=1, **SMALL[name])
    whole = execute(info, cfg, tmp_path / "run", toy=True)
    assert capsys.readouterr().out.count(f"'{NAME}': images of 8 × 8 (3 channels, the last axis)") == 1
    results = {key: value for key, value in whole["metrics"].items() if "return" in key}
    assert results
    assert all(0 <= value <= 6 for value in results.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "a2c,lambda"}, "lambda learns from vectors: omit it from --methods; a2c has convolutions"),
        ({"methods": "sac", "continuous_env": "finetune/Steered-v0"}, "sac, td3 learns from vectors"),
    ],
)
def test_methods_without_convolutions_refuse_images(options, message, tmp_path):
    class Steered(Catch):
        def __init__(self):
            super().__init__()
            self.action_space = gymnasium.spaces.Box(0, 2, (1,))

        def step(self, action):
            return super().step(round(float(action[0])))

    gymnasium.register("finetune/Steered-v0", Steered)
    info = registry.find("actor_critic")
    cfg = dataclasses.replace(actor_critic.Config.toy(), **({"env": NAME} | options))
    with pytest.raises(UserError, match=message):
        execute(info, cfg, tmp_path / "run", toy=True)
    del gymnasium.registry["finetune/Steered-v0"]
