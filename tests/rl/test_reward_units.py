"""Rewards in another unit: a power of two changes no bit of what is learned, and × 100 or × 0.01 learns as well."""

import dataclasses

import gymnasium
import pytest
import torch
from summaries import numbers

from finetune.rl.agents.reward_scale import RewardSize
from finetune.runs import registry
from finetune.runs.run import Run, execute

SETTINGS = {
    "actor_critic": {"repeats": 1, "envs": 2, "eval_episodes": 2, "freeze_after": 1, "critic_steps": 1,
                     "critic_states": 4, "critic_episodes": 2,
                     "hidden": 8, "horizon": 4, "continuous_hidden": 8, "batch": 8, "warmup": 60},
    "policy_gradient": {"methods": "reinforce,trpo", "hidden": 8, "episodes": 4, "eval_episodes": 2,
                        "corridor_steps": 0, "score_episodes": 1000, "variance_groups": 0},
    "gae": {"ppo_repeats": 1, "ppo_hidden": 8, "ppo_horizon": 32, "ppo_envs": 2, "ppo_lams": "0.95", "samples": 1,
            "rows": 2},
}  # fmt: skip


@pytest.fixture
def scaled(monkeypatch):
    """Ids of CartPole and Pendulum whose rewards are multiplied."""
    monkeypatch.setattr(Run, "curves", lambda self: None)
    made = {}

    def of(name, factor):
        def build():
            return gymnasium.wrappers.TransformReward(gymnasium.make(name), lambda r: factor * r)

        made[key := f"finetune/{name.split('-')[0]}{len(made)}-v0"] = build
        gymnasium.register(key, build)
        return key

    yield of
    for key in made:
        del gymnasium.registry[key]


def learned(module, folder, factor, **settings):
    """Returns before and after and what critics are off by, in rewards of 1."""
    info = registry.find(module)
    config = dataclasses.replace(registry.load(info).Config.toy(), threads=1, seed=3, **SETTINGS[module] | settings)
    summary = execute(info, config, folder, toy=True)
    found = numbers(summary)
    return {n: v / factor for n, v in found.items() if "return" in n or "critic_bias" in n}


METHODS = [("actor_critic", "CartPole-v1", {"steps": 2, "methods": m}) for m in ("one_step", "a2c", "lambda", "vtrace")]
METHODS += [("actor_critic", "Pendulum-v1", {"steps": 2, "methods": m}) for m in ("sac", "td3")]
METHODS += [("policy_gradient", "CartPole-v1", {"steps": 3}), ("gae", "CartPole-v1", {"steps": 4, "ppo_updates": 4})]


@pytest.mark.parametrize(("module", "env", "settings"), METHODS)
def test_what_is_learned_does_not_depend_on_the_unit(module, env, settings, tmp_path, scaled, monkeypatch):
    monkeypatch.setattr(registry.part(module, "plots"), "save", lambda made, path: None)
    field = {"gae": "ppo_env", "policy_gradient": "env"}.get(
        module, "env" if env == "CartPole-v1" else "continuous_env"
    )
    found = {}
    for factor in (1.0, 2.0**-7):
        given = settings | {field: scaled(env, factor)}
        found[factor] = learned(module, tmp_path / f"{factor}", factor, **given)
    assert found[1.0]
    assert found[2.0**-7] == found[1.0]


TRAININGS = {
    "policy_gradient": {"corridor_steps": 0, "score_episodes": 1000, "variance_groups": 0},
    "gae": {"ppo_lams": "0.95", "samples": 1, "rows": 1, "steps": 20, "bench_steps": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("factor", [100.0, 0.01])
@pytest.mark.parametrize("module", TRAININGS)
def test_a_training_on_scaled_rewards_reaches_the_scaled_target(module, factor, tmp_path, scaled, no_pictures):
    """The toy's own targets: a quarter of the way to the best return with TRPO, 195 with PPO."""
    info = registry.find(module)
    field, result = {"gae": ("ppo_env", "ppo_return_0_95"), "policy_gradient": ("env", "return_trpo")}[module]
    changes = TRAININGS[module] | {field: scaled("CartPole-v1", factor), "threads": 1}
    summary = execute(
        info, dataclasses.replace(registry.load(info).Config.toy(), **changes), tmp_path / "run", toy=True
    )
    after, before = summary["metrics"][result] / factor, summary["baseline"][result] / factor
    assert after > (195 if module == "gae" else before + 0.25 * (500 - before))


def test_the_size_is_that_of_the_largest_so_far():
    size = RewardSize()
    assert size.see(torch.zeros(3)) == 1
    assert size.see(torch.tensor([0.01, -0.25])) == 0.25
    assert size.see(torch.tensor([0.1])) == 0.25
    other = RewardSize()
    other.load_state_dict(size.state_dict())
    assert other.size == 0.25
