"""The gae module: the variants equal the op and the peers; bias and variance; time limits; PPO; controls; resume."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from resumed import resumes_to_the_same_bytes

from finetune import ops
from finetune.errors import UserError
from finetune.rl.advantages import whitened
from finetune.rl.agents import surrogate
from finetune.rl.envs import environments
from finetune.rl.envs.vector import VectorEnv
from finetune.rl.statistics import gradient_bias
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.sample import sample_tabular
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("gae")
gae = registry.load(INFO)
bias_variance, time_limits, ppo, variants = (
    registry.part("gae", name) for name in ("bias_variance", "time_limits", "ppo", "variants")
)
VARIANTS = variants.VARIANTS
LENGTHS = [1, 2, 3, 17, 256, 1031, 4097]


def toy(**changes):
    return dataclasses.replace(gae.Config.toy(), threads=1, **changes)


def rollout(steps, rows, seed=0, ends=0.1):
    """Random numbers with both kinds of end; V of the next state is the next row's V except at an end."""
    g = torch.Generator().manual_seed(seed)
    r, v, after = (torch.randn(steps, rows, generator=g, dtype=torch.float64) for _ in range(3))
    terminated, truncated = (torch.rand(steps, rows, generator=g) < ends for _ in range(2))
    truncated &= ~terminated
    follows = torch.cat([v[1:], after[-1:]])
    return r, v, torch.where(terminated | truncated, after, follows), terminated, truncated


def close(mine, theirs):
    assert (mine - theirs).abs().max() <= 1e-12 * max(1.0, theirs.abs().max())


# --- The same numbers as others


@pytest.mark.peer
@pytest.mark.parametrize("steps", LENGTHS)
def test_equals_stable_baselines3(steps):
    """Its buffer knows ends only; its collector adds γ V of the last observation to the reward of a truncated step."""
    gym = pytest.importorskip("gymnasium")
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    r, v, after, terminated, truncated = rollout(steps, 3, seed=steps)
    ends = terminated | truncated
    space = gym.spaces.Box(-1, 1, (1,))
    buffer = buffers.RolloutBuffer(steps, space, space, device="cpu", gae_lambda=0.9, gamma=0.97, n_envs=3)
    buffer.rewards = (r + 0.97 * after * truncated).numpy()
    buffer.values, buffer.advantages = v.numpy(), np.zeros((steps, 3))
    buffer.episode_starts = torch.cat([torch.ones(1, 3, dtype=torch.bool), ends[:-1]]).double().numpy()
    buffer.compute_returns_and_advantage(after[-1], ends[-1].double().numpy())
    advantages, returns = ops.gae(r, v, after, terminated, truncated, gamma=0.97, lam=0.9)
    close(advantages, torch.from_numpy(buffer.advantages))
    close(returns, torch.from_numpy(buffer.returns))


@pytest.mark.peer
@pytest.mark.parametrize("steps", LENGTHS)
def test_equals_torchrl(steps):
    peer = pytest.importorskip("torchrl.objectives.value.functional")
    r, v, after, terminated, truncated = rollout(steps, 3, seed=steps)

    def turned(x):
        return x.T[..., None]  # (N, T, 1)

    torch.set_default_dtype(torch.float64)  # it multiplies γ with an integer mask, which rounds γ to the default
    try:
        theirs = peer.generalized_advantage_estimate(
            0.97, 0.9, *map(turned, (v, after, r, terminated | truncated, terminated))
        )
    finally:
        torch.set_default_dtype(torch.float32)
    mine = ops.gae(r, v, after, terminated, truncated, gamma=0.97, lam=0.9)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b[..., 0].T)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("gamma", "lam"), [(0.97, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_every_variant_equals_the_op(variant, gamma, lam):
    for steps in (1, 2, 5, 33, 64):
        given = rollout(steps, 4, seed=steps)
        close(VARIANTS[variant](*given, gamma, lam), ops.gae(*given, gamma=gamma, lam=lam)[0])


@pytest.mark.parametrize("variant", ["definition", "recursion", "scan"])
def test_nothing_behind_an_end_comes_through(variant):
    """A NaN there included; the matrix multiplies by zero, so it cannot do that."""
    r, v, after, terminated, truncated = rollout(20, 2)
    terminated[9] = True
    before = VARIANTS[variant](r, v, after, terminated, truncated, 0.9, 0.8)[:10]
    r[10:] = torch.nan
    assert torch.equal(VARIANTS[variant](r, v, after, terminated, truncated, 0.9, 0.8)[:10], before)


def test_packed_and_padded_sequences_are_each_their_own():
    lengths = [5, 1, 17, 8]
    parts = [rollout(n, 1, seed=n, ends=0.0) for n in lengths]
    for part in parts:
        part[3][-1] = True
    alone = [ops.gae(*part)[0] for part in parts]
    packed = ops.gae(*(torch.cat(column) for column in zip(*parts, strict=True)))[0]
    close(packed, torch.cat(alone))
    padded = [torch.nn.utils.rnn.pad_sequence([x[:, 0] for x in column]) for column in zip(*parts, strict=True)]
    padded[0][padded[0] == 0] = 1e6  # the values in the padding do not matter
    together = ops.gae(*padded)[0]
    for i, n in enumerate(lengths):
        close(together[:n, i : i + 1], alone[i])


# --- Bias and variance


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_the_expectation_with_the_exact_critic_is_the_advantage_at_any_length(lam):
    mdp = tables.garnet(8, 3, 2, np.random.default_rng(0), 0.9, ending=0.1)
    policy = tables.uniform(mdp)
    V = tables.solve(mdp, policy)
    for steps in (1, 5, 200):
        found = bias_variance.expected_advantages(mdp, policy, V, lam, steps)
        assert np.allclose(found, tables.advantages(mdp, policy), atol=1e-12)


def test_at_lambda_one_the_gradient_sees_no_bias():
    """With any V, Â of the whole return is off by V^π(s) − V(s), the same for every action."""
    mdp = tables.garnet(8, 3, 2, np.random.default_rng(0), 0.9, ending=0.1)
    policy, V = tables.uniform(mdp), np.random.default_rng(1).normal(size=9) * np.append(np.ones(8), 0)
    found = bias_variance.expected_advantages(mdp, policy, V, 1.0, 2000)
    off = found - tables.advantages(mdp, policy)
    assert np.allclose(off, (tables.solve(mdp, policy) - V)[:, None], atol=1e-12)
    assert gradient_bias(off.ravel(), policy, np.ones((9, 3), bool)) < 1e-12


def test_the_target_of_a_critic_is_the_standard_error_of_one_batch_of_returns():
    """Against returns that are played out: the variance of each state's, over the visits of a batch."""
    mdp = tables.garnet(6, 2, 2, np.random.default_rng(3), 0.8, ending=0.1)
    policy, config = tables.uniform(mdp), toy(rows=50, length=40)
    V = tables.solve(mdp, policy)
    bar = time_limits.one_batch_error(config, mdp, policy, V, np.random.default_rng(0))
    rng, squares = np.random.default_rng(1), []
    starts = rng.choice(len(V), config.rows, p=mdp.start)
    seen = sample_tabular(mdp, policy, config.length, starts, rng, limit=config.limit).observations
    visits = np.bincount(seen.flatten().numpy(), minlength=len(V))
    for s in np.flatnonzero(~mdp.terminal):
        rewards = sample_tabular(mdp, policy, 60, np.full(4000, s), rng)
        alive = rewards.first_episode
        returns = (0.8 ** torch.arange(60)[:, None] * rewards.rewards * alive).sum(0)
        squares.append(float(returns.var()) / visits[s])
    assert bar == pytest.approx(np.sqrt(np.mean(squares)), rel=0.1)
    twice = tables.make(mdp.P, 2 * mdp.rewards, 0.8, terminal=mdp.terminal, start=mdp.start, actions=mdp.actions)
    assert time_limits.one_batch_error(config, twice, policy, 2 * V, np.random.default_rng(0)) == pytest.approx(2 * bar)


def test_the_toy_reaches_its_targets(tmp_path):
    summary = execute(INFO, toy(), tmp_path / "run", toy=True)
    assert summary["passed"], summary["reached"]
    assert (tmp_path / "run/bias_variance.png").stat().st_size > 10_000
    assert (tmp_path / "run/time_limits.png").stat().st_size > 10_000
    assert (tmp_path / "run/ppo_lambda.png").stat().st_size > 10_000


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_a_critic_learns_from_rewards_in_another_unit(factor, tmp_path, no_pictures):
    mdp = tables.garnet(8, 3, 2, np.random.default_rng(0), 0.9, mean=1.0, ending=0.02)
    np.savez(tmp_path / "mdp.npz", P=mdp.P, R=factor * mdp.rewards)
    config = toy(data=tmp_path / "mdp.npz", samples=1, bench_steps=8, ppo_repeats=0)
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    assert summary["metrics"]["value_rmse"] < 0.5 * summary["baseline"]["value_rmse"]
    assert summary["metrics"]["bias_largest_lambda"] < 0.1 * summary["baseline"]["bias_largest_lambda"]


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}, {"shuffle_rewards": True}])
def test_without_steps_rate_or_rewards_nothing_is_learned(change, tmp_path):
    summary = execute(INFO, toy(samples=1, ppo_repeats=0, **change), tmp_path / "run", toy=True)
    assert not summary["reached"]["value_rmse"]
    assert summary["metrics"]["value_rmse"] > 0.8 * summary["baseline"]["value_rmse"]


def test_a_cut_run_resumes(tmp_path, no_pictures):
    """Cut off in PPO's second update with λ = 0.95."""
    config = toy(steps=2, samples=1, rows=1, checkpoint_every=1, bench_steps=8, ppo_horizon=40, ppo_epochs=1)
    resumes_to_the_same_bytes(INFO, config, tmp_path, 6)


# --- PPO


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 4, "ppo_lr": 0.0}, {"steps": 8, "shuffle_rewards": True}])
def test_without_updates_rate_or_advantages_ppo_learns_nothing(change, tmp_path):
    small = toy(samples=1, rows=1, bench_steps=8, ppo_minibatches=4, **change)
    summary = execute(INFO, small, tmp_path / "run", toy=True)
    assert not summary["reached"]["ppo_return_0_95"]


def learner_and_rollout(**changes):
    torch.manual_seed(0)
    config = toy(ppo_horizon=30, ppo_envs=3, **changes)
    envs = environments.make("CartPole-v1", 3)
    learner, vector = ppo.PPO(config, envs, 0.9), VectorEnv(envs, 0)
    return learner, vector.collect(partial(learner.act, rng=torch.Generator().manual_seed(0)), 30)


def test_ppos_advantages_are_gae_of_the_critic_before_the_updates():
    learner, rollout = learner_and_rollout()
    batch = learner.batch(rollout)
    with torch.no_grad():
        values, next_values = learner.value(rollout.observations), learner.value(rollout.next_observations)
    ends = rollout.terminated, rollout.truncated
    expected = VARIANTS["definition"](rollout.rewards, values, next_values, *ends, learner.cfg.ppo_gamma, 0.9)
    assert torch.allclose(batch.advantages, expected.flatten(), atol=1e-5)
    assert torch.allclose(batch.targets, (expected + values).flatten(), atol=1e-5)
    _, log_ratios = learner.loss(batch)
    assert float(log_ratios.abs().max()) < 1e-6  # nothing has moved yet


def test_ppos_loss_is_that_of_the_library():
    """finetune/rl/agents/surrogate.py, which equals torchrl's (tests/rl/test_rl.py)."""
    learner, rollout = learner_and_rollout(ppo_entropy=0.01)
    batch = learner.batch(rollout)
    batch.log_probs = batch.log_probs + 0.5 * torch.randn(
        len(batch.log_probs), generator=torch.Generator().manual_seed(1)
    )
    loss, log_ratios = learner.loss(batch)
    assert surrogate.clip_fraction(log_ratios, 0.2) > 0.2
    policy_loss = surrogate.clipped_surrogate(log_ratios, whitened(batch.advantages), 0.2).mean()
    value_loss = surrogate.value_loss(learner.value(batch.observations), batch.targets).mean()
    entropy = learner.policy.entropy(learner.policy(batch.observations)).mean()
    assert torch.allclose(loss, policy_loss + 0.5 * value_loss - 0.01 * entropy)


@pytest.mark.long
@pytest.mark.parametrize("seed", [21, 22, 23])
def test_ppo_with_the_usual_lambda_solves_cartpole(seed, tmp_path):
    config = dataclasses.replace(gae.Config(), seed=seed, steps=40, samples=1, ppo_lams="0.95", ppo_repeats=1)
    summary = execute(INFO, config, tmp_path / "run")
    assert summary["metrics"]["ppo_return_0_95"] >= 475 > summary["baseline"]["ppo_return_0_95"]
    assert summary["metrics"]["ppo_steps_0_95"] < 40_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ppo_lams": "2"}, "--ppo-lams 2: numbers from 0 to 1"),
        ({"ppo_clip": 0.0}, "--ppo-clip 0 is too small: it must be above 0"),
        ({"ppo_repeats": -1}, "--ppo-repeats -1 is too small"),
        ({"lams": "0,1,0.5"}, "--lams 0,1,0.5: at least two numbers"),
        ({"lams": "a"}, "--lams a: numbers"),
        ({"gamma": 1.0}, "--gamma 1"),
        ({"lr": 2.0}, "--lr 2 is too large: it must be at most 1"),
        ({"length": 0}, "--length 0 is too small"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        toy(**change)
