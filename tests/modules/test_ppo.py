"""The ppo module: losses equal torchrl's; the first ratios are 1; no clip, no change; controls; resume."""

import dataclasses

import pytest
import torch
from resumed import resumes_to_the_same_bytes

from finetune import ops
from finetune.errors import UserError
from finetune.rl.agents import surrogate
from finetune.rl.agents.learner import Learner
from finetune.rl.envs import environments
from finetune.rl.envs.vector import VectorEnv
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("ppo")
module = registry.load(INFO)
ppo, ablation = registry.part("ppo", "ppo"), registry.part("ppo", "ablation")


def toy(**changes):
    return dataclasses.replace(module.Config.toy(), **changes)


def agent_on(env="CartPole-v1", seed=0, **changes):
    """A PPO with three environments, and a generator."""
    torch.manual_seed(seed)
    config = toy(**{"horizon": 33, "minibatches": 4, "hidden": 16} | changes)
    return ppo.PPO(config, VectorEnv(environments.make(env, 3), seed)), torch.Generator().manual_seed(seed)


def moved(agent, rng, by=0.1):
    """A batch of the agent, and its policy a step away from the one that collected it."""
    batch = agent.batch(agent.collect(rng), rng)
    with torch.no_grad():
        for p in agent.model.parameters():
            p += by * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return batch


# --- The same numbers as others


@pytest.mark.peer
@pytest.mark.parametrize("value_clip", [0.2, None])
def test_losses_and_gradient_are_torchrls(value_clip):
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.modules import ValueOperator
    from torchrl.objectives import ClipPPOLoss

    agent, rng = agent_on(normalize_advantages=False, value_clip=value_clip, entropy=0.01)
    agent.collect(rng)  # so that observations are standardized
    batch = moved(agent, rng)
    agent.model.double()
    batch = ppo.Batch(**{k: v.double() if v.is_floating_point() else v for k, v in vars(batch).items()})
    loss, log_ratios, parts = agent.loss(batch)
    assert surrogate.clip_fraction(log_ratios, 0.2) > 0.1
    net = TensorDictModule(agent.model.policy.net, in_keys=["observation"], out_keys=["logits"])
    sampler = ProbabilisticTensorDictModule(
        in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )  # fmt: skip
    theirs = ClipPPOLoss(
        ProbabilisticTensorDictSequential(net, sampler), ValueOperator(agent.model.value.net, in_keys=["observation"]),
        clip_epsilon=0.2, clip_value=value_clip, entropy_coeff=0.01, critic_coeff=0.5, loss_critic_type="l2",
        normalize_advantage=False,
    )  # fmt: skip
    found = theirs(TensorDict(
        {"observation": batch.observations, "action": batch.actions, "action_log_prob": batch.log_probs,
         "advantage": batch.advantages[:, None], "value_target": batch.targets[:, None],
         "state_value": batch.values[:, None]}, [len(batch.values)],
    ))  # fmt: skip
    mine = {"loss_objective": parts["policy_loss"], "loss_critic": 0.5 * parts["value_loss"],
            "loss_entropy": -0.01 * parts["entropy"]}  # fmt: skip
    for name, value in mine.items():
        assert float((value - found[name]).detach().abs()) <= 1e-7, name
    gradients = torch.autograd.grad(loss, [*agent.model.parameters()])
    agent.model.zero_grad()
    sum(found[name] for name in mine).backward()
    for mine_, p in zip(gradients, agent.model.parameters(), strict=True):
        assert float((mine_ - p.grad).abs().max()) <= 1e-7


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_loss_is_the_librarys_and_log_pi_is_torchs(env):
    agent, rng = agent_on(env, normalize_advantages=False)
    batch = moved(agent, rng)
    _, log_ratios, parts = agent.loss(batch)
    params, values = agent.model(batch.observations)
    if agent.model.policy.__class__.__name__ == "Gaussian":
        mean, log_std = params.chunk(2, -1)
        its = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    else:
        its = torch.distributions.Categorical(logits=params)
    assert torch.allclose(its.log_prob(batch.actions) - batch.log_probs, log_ratios, atol=1e-5)
    assert torch.allclose(its.entropy().mean(), parts["entropy"], atol=1e-5)
    expected = surrogate.clipped_surrogate(log_ratios, batch.advantages, 0.2).mean()
    assert torch.allclose(parts["policy_loss"], expected, atol=1e-6)
    expected = surrogate.value_loss(values, batch.targets, batch.values, 0.2).mean()
    assert torch.allclose(parts["value_loss"], expected, atol=1e-6)


def test_the_penalty_is_the_kl_divergence_from_the_old_policy():
    agent, rng = agent_on(objective="kl", kl_weight=3.0, normalize_advantages=False)
    batch = moved(agent, rng)
    _, log_ratios, parts = agent.loss(batch)
    old, new = (torch.distributions.Categorical(logits=p) for p in (batch.params, agent.model(batch.observations)[0]))
    kl = torch.distributions.kl_divergence(old, new).mean()
    expected = 3 * kl - (log_ratios.exp() * batch.advantages).mean()
    assert kl > 1e-3
    assert torch.allclose(parts["policy_loss"], expected, atol=1e-6)


@pytest.mark.parametrize(("by", "weight"), [(0.0, 0.5), (0.3, 2.0)])
def test_the_penaltys_weight_follows_its_target(by, weight):
    agent, rng = agent_on(objective="kl")
    assert agent.adapt(moved(agent, rng, by)) == weight


# --- Where an update begins


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_first_ratios_of_every_update_are_exactly_one(env):
    agent, rng = agent_on(env)
    for _ in range(4):
        batch = agent.batch(agent.collect(rng), rng)
        for minibatch in batch.split(agent.size(len(batch.values))):  # as in the first pass
            _, log_ratios, _ = agent.loss(minibatch)
            assert not log_ratios.any()
            assert surrogate.clip_fraction(log_ratios, 0.0) == 0
        assert agent.step(1.0, rng)["first_ratio"] == 0


def test_a_clip_of_zero_changes_nothing():
    """Neither at the first step, where every ratio is 1, nor later; the critic learns all the same."""
    agent, rng = agent_on(clip=0.0, entropy=0.0, horizon=32)
    before = [p.clone() for p in agent.model.policy.parameters()]
    values = [p.clone() for p in agent.model.value.parameters()]
    for _ in range(3):
        agent.step(1.0, rng)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.model.policy.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(values, agent.model.value.parameters(), strict=True))


@pytest.mark.parametrize("change", [{}, {"value_clip": None}, {"objective": "kl"}, {"normalize_advantages": False}])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_gradient_that_is_written_out_is_that_of_the_loss(env, change):
    """Also that the gradients of all parameters are views of the row that the optimizer sees."""
    agent, rng = agent_on(env, entropy=0.01, **change)
    batch = moved(agent, rng)
    loss, log_ratios, parts = agent.loss(batch)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*agent.model.parameters()])])
    agent.row.grad.zero_()
    ratios, means = agent.backward(batch)
    torch.testing.assert_close(agent.row.grad, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(ratios, log_ratios)
    torch.testing.assert_close(means, torch.stack([*parts.values()]).detach())
    assert wanted.norm() > 1e-3


def test_advantages_are_gae_and_a_time_limit_bootstraps():
    """V of the state that a step reached, here computed for every step; without --bootstrap a limit is an end."""
    for bootstrap in (True, False):
        torch.manual_seed(0)
        config = toy(horizon=50, hidden=16, bootstrap=bootstrap, shuffle=False)
        agent = ppo.PPO(config, VectorEnv(environments.make("CartPole-v1", 3, limit=8), 0))
        rng = torch.Generator().manual_seed(0)
        rollout = agent.collect(rng)
        assert rollout.truncated.sum() > 5
        batch = agent.batch(rollout, rng)
        with torch.no_grad():
            values, after = agent.model.values(rollout.observations), agent.model.values(rollout.next_observations)
        ends = rollout.terminated | (rollout.truncated & (not bootstrap))
        cut = rollout.truncated & bootstrap
        expected, _ = ops.gae(rollout.rewards, values, after, ends, cut, gamma=0.99, lam=0.95)
        assert torch.allclose(batch.advantages.sort()[0], expected.flatten().sort()[0], atol=1e-5)


def test_observations_and_rewards_are_normalized():
    agent, rng = agent_on("Pendulum-v1", horizon=200)
    raw = []
    keep, agent.envs.collect = agent.envs.collect, lambda *args: raw.append(keep(*args)) or raw[-1]
    for _ in range(2):
        seen = agent.collect(rng)
        raw[-1] = dataclasses.replace(raw[-1])
    assert seen.observations.mean((0, 1)).abs().max() < 0.5
    assert (seen.observations.std((0, 1)) - 1).abs().max() < 0.5
    assert seen.rewards.abs().max() <= 10
    everything = agent.standardized.seen
    assert int(everything.count) == 2 * 200 * 3
    agent.standardized.clip = 0.1
    assert agent.standardized(torch.full((1, 3), 1e6)).tolist() == [[pytest.approx(0.1)] * 3]


def test_target_kl_stops_the_passes():
    agent, rng = agent_on(lr=0.05, target_kl=1e-4, epochs=6)
    assert agent.step(1.0, rng)["passes"] == 1
    agent, rng = agent_on(lr=0.0, target_kl=1e-4, epochs=6)
    assert agent.step(1.0, rng)["passes"] == 6


def test_every_detail_of_the_ablation_changes_the_training():
    assert len(ablation.OFF) >= 8
    fast = {"horizon": 64, "lr": 0.02}
    plain, rng = agent_on(**fast)
    plain.envs = VectorEnv(environments.make("CartPole-v1", 3, limit=10), 0)
    for _ in range(2):
        plain.step(0.9, rng)
    for name, (changes, _) in ablation.OFF.items():
        if name == "annealing":  # it is the loop's
            continue
        agent, rng = agent_on(**fast | changes)
        agent.envs = VectorEnv(environments.make("CartPole-v1", 3, limit=10), 0)
        for _ in range(2):
            agent.step(0.9, rng)
        a, b = (torch.cat([p.detach().flatten() for p in its.model.parameters()]) for its in (plain, agent))
        assert a.shape != b.shape or not torch.equal(a, b), name


def test_it_is_a_learner():
    agent, rng = agent_on()
    assert isinstance(agent, Learner)
    shared, rng = agent_on(shared=True)
    assert shared.step(1.0, rng)["entropy"] > 0


# --- Runs


def test_the_toy_reaches_its_target(tmp_path):
    summary = execute(INFO, toy(), tmp_path / "run", toy=True)
    assert summary["passed"]
    assert summary["metrics"]["return_cartpole_clip"] >= 400 > summary["baseline"]["return_cartpole_clip"]
    for name in ("returns", "diagnostics"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}, {"shuffle": True}])
def test_without_updates_rate_or_advantages_nothing_is_learned(change, tmp_path, no_pictures):
    summary = execute(INFO, toy(**{"steps": 8} | change), tmp_path / "run", toy=True)
    assert not summary["reached"]["return_cartpole_clip"]
    assert summary["metrics"]["return_cartpole_clip"] < 60


def test_a_cut_run_resumes(tmp_path, no_pictures):
    small = {"steps": 3, "checkpoint_every": 1, "horizon": 16, "hidden": 8, "epochs": 1, "eval_episodes": 2}
    config = toy(**small, objectives="clip,kl", env=("CartPole-v1", "Pendulum-v1"), envs=2)
    resumes_to_the_same_bytes(INFO, config, tmp_path, 9)


def test_the_ablation_reports_every_detail(tmp_path, no_pictures):
    small = {"horizon": 16, "envs": 2, "hidden": 8, "epochs": 1, "eval_episodes": 2, "max_episode_steps": 20}
    config = toy(experiment="ablation", ablation_updates=2, ablation_seeds=2, **small)
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    assert {"curve_all_on", "curve_worst_off", "details_that_matter"} == set(summary["metrics"])
    assert "bootstrap at time limits" in (tmp_path / "run/samples.json").read_text()
    assert (tmp_path / "run/ablation.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": "clip,trpo"}, "--objectives: 'trpo' is not one of clip, kl"),
        ({"clip": -0.1}, "--clip -0.1 is too small"),
        ({"gamma": 1.5}, "--gamma 1.5 is too large"),
        ({"target_kl": 0.0}, "--target-kl 0 is too small: it must be above 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        toy(**change)


def test_mujoco_is_refused_by_name_where_it_is_missing(tmp_path):
    try:
        import mujoco  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"'HalfCheetah-v5' cannot be made.*mujoco"):
            execute(INFO, toy(env=("HalfCheetah-v5",)), tmp_path / "run", toy=True)


# --- Targets on seeds that nothing was tuned to


def after(env, seed, folder, **changes):
    config = dataclasses.replace(module.Config(), env=(env,), objectives="clip", repeats=1, seed=seed, **changes)
    (found,) = (v for k, v in execute(INFO, config, folder)["metrics"].items() if k.startswith("return_"))
    return found


@pytest.mark.long
@pytest.mark.parametrize("seed", [31, 32, 33])
def test_cartpole_within_100000_steps(seed, tmp_path, no_pictures):
    assert 8 * 128 * 97 <= 100_000
    assert after("CartPole-v1", seed, tmp_path / "run", steps=97) >= 475


@pytest.mark.long
@pytest.mark.parametrize("seed", [31, 32, 33])
@pytest.mark.parametrize(("env", "least"), [("Acrobot-v1", -100), ("Pendulum-v1", -250)])
def test_acrobot_and_pendulum(env, least, seed, tmp_path, no_pictures):
    assert after(env, seed, tmp_path / "run", steps=97) >= least


@pytest.mark.long
def test_halfcheetah_reaches_what_cleanrl_publishes(tmp_path, no_pictures):
    """1,443 ± 46 after a million steps of HalfCheetah-v4 (ppo_continuous_action.py, three seeds)."""
    pytest.importorskip("mujoco", reason="needs gymnasium[mujoco]")
    usual = {"gamma": 0.99, "lr": 3e-4, "horizon": 2048, "envs": 1, "epochs": 10, "minibatches": 32}
    assert after("HalfCheetah-v5", 0, tmp_path / "run", steps=488, **usual) >= 1443 - 46
