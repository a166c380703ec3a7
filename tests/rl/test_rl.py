"""finetune.rl: what is sampled, and the estimates from it."""

import importlib.util
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune import ops
from finetune.errors import UserError
from finetune.rl import advantages
from finetune.rl.agents import networks, surrogate
from finetune.rl.agents.reward_scale import RewardScale
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import interval
from finetune.rl.statistics import Moments, Welford, chi_square_z, chi_square_z_correlated
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.sample import sample_tabular


def garnet(**changes):
    return tables.garnet(6, 3, 2, np.random.default_rng(0), 0.9, **{"ending": 0.2} | changes)


def test_tabular_rollouts_follow_policy_table_and_start():
    mdp, rng = garnet(), np.random.default_rng(1)
    policy = rng.dirichlet(np.ones(3), 7)
    rollout = sample_tabular(mdp, policy, 60, np.zeros(2000, np.intp), rng)
    s, a, after = rollout.observations, rollout.actions, rollout.next_observations
    seen = torch.zeros(7, 3, 7).index_put_((s, a, after), torch.ones(()), accumulate=True).numpy()
    assert not seen[6].any(), "no step begins in the terminal state"
    visits = seen.sum(2)
    assert abs(visits[:6] / visits[:6].sum(1, keepdims=True) - policy[:6]).max() < 0.02
    assert abs(seen[:6] / visits[:6, :, None] - mdp.P[:6]).max() < 0.04
    assert np.array_equal(rollout.rewards.numpy(), mdp.rewards[s, a, after])
    assert torch.equal(rollout.terminated, after == 6)
    assert not rollout.truncated.any()
    goes_on = ~rollout.ends[:-1]
    assert torch.equal(s[1:][goes_on], after[:-1][goes_on])
    begun = np.bincount(s[1:][~goes_on].numpy(), minlength=7) / int((~goes_on).sum())
    assert abs(begun - mdp.start).max() < 0.02


def test_tabular_rollouts_take_the_first_actions_and_the_time_limit():
    mdp, first = garnet(ending=0.0), np.arange(300) % 3
    policy = tables.one_hot(mdp, np.zeros(6, int))
    rng = np.random.default_rng(0)
    rollout = sample_tabular(mdp, policy, 7, np.full(300, 2), rng, actions=first, limit=3)
    assert np.array_equal(rollout.actions[0].numpy(), first)
    assert not rollout.actions[1:].any()
    assert rollout.truncated.all(1).tolist() == [False, False, True, False, False, True, False]
    assert not rollout.terminated.any()
    assert torch.equal(rollout.truncated.any(1), rollout.truncated.all(1))


# --- Advantages


def numbers(steps, rows, seed=0, ends=0.1):
    """rewards, values, next_values, terminated, truncated; V of the next state is the next row's except at an end."""
    g = torch.Generator().manual_seed(seed)
    r, v, after = (torch.randn(steps, rows, generator=g, dtype=torch.float64) for _ in range(3))
    terminated, truncated = (torch.rand(steps, rows, generator=g) < ends for _ in range(2))
    follows = torch.cat([v[1:], after[-1:]])
    return r, v, torch.where(terminated | truncated, after, follows), terminated, truncated & ~terminated


def ratios(steps, rows):
    return torch.randn(steps, rows, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_n_step_is_the_td_error_at_one_and_the_whole_return_beyond_the_end():
    given = numbers(40, 5)
    for n, lam in ((1, 0.0), (40, 1.0), (99, 1.0)):
        wanted, _ = ops.gae(*given, gamma=0.9, lam=lam)
        assert torch.allclose(advantages.n_step(*given, n=n, gamma=0.9), wanted, atol=1e-12)


def test_n_step_is_n_rewards_and_the_critic():
    r, v, after, no, _ = numbers(6, 2, ends=0.0)
    wanted = r[1] + 0.9 * r[2] + 0.81 * r[3] + 0.9**3 * after[3] - v[1]
    assert torch.allclose(advantages.n_step(r, v, after, no, no, n=3, gamma=0.9)[1], wanted)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_without_clipping_to_do_vtrace_is_the_lambda_return(lam):
    given = numbers(40, 5)
    _, returns = ops.gae(*given, gamma=0.9, lam=lam)
    _, targets = advantages.vtrace(*given, torch.zeros(40, 5, dtype=torch.float64), gamma=0.9, lam=lam)
    assert torch.allclose(targets, returns, atol=1e-12)


@pytest.mark.peer
@pytest.mark.parametrize(("rho", "c"), [(1.0, 1.0), (2.0, 0.7)])
def test_vtrace_equals_torchrl(rho, c):
    peer = pytest.importorskip("torchrl.objectives.value.functional")
    r, v, after, terminated, truncated = given = numbers(60, 3)
    log_ratios = ratios(60, 3)

    def turned(x):
        return x.T[..., None]

    torch.set_default_dtype(torch.float64)  # γ times an integer mask is of the default dtype there
    try:
        theirs = peer.vtrace_advantage_estimate(
            0.9, *map(turned, (log_ratios, torch.zeros_like(v), v, after, r, terminated | truncated, terminated)),
            rho_thresh=rho, c_thresh=c,
        )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    mine = advantages.vtrace(*given, log_ratios, gamma=0.9, rho_bar=rho, c_bar=c)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b[..., 0].T, atol=1e-12)


@pytest.mark.parametrize("name", ["retrace", "tree_backup"])
def test_retrace_and_tree_backup_are_their_definitions(name):
    """Q_t + Σ_k γ^k (Π_{1..k} c_i) δ_{t+k}, up to the end."""
    r, q, after, terminated, truncated = given = numbers(30, 4)
    ends = terminated | truncated
    logs = ratios(30, 4) if name == "retrace" else -ratios(30, 4).abs()
    delta = r + 0.9 * after * ~terminated - q
    c = 0.8 * logs.exp().clamp(max=1)
    wanted = q.clone()
    for n in range(4):
        for t in range(30):
            weight = 1.0
            for k in range(t, 30):
                wanted[t, n] += weight * delta[k, n]
                if ends[k, n] or k == 29:
                    break
                weight *= 0.9 * c[k + 1, n]
    assert torch.allclose(getattr(advantages, name)(*given, logs, gamma=0.9, lam=0.8), wanted, atol=1e-12)


def test_tree_backup_of_a_policy_sure_of_itself_is_retrace_on_policy():
    given, zeros = numbers(30, 4), torch.zeros(30, 4, dtype=torch.float64)
    found = [f(*given, zeros, gamma=0.9, lam=0.7) for f in (advantages.retrace, advantages.tree_backup)]
    assert torch.equal(*found)


def test_upgo_is_its_definition():
    """The return, followed as long as Q(s, a) ≈ r + γ V(s') is not below V(s); then V."""
    r, v, after, terminated, truncated = given = numbers(30, 4)
    ends, q = terminated | truncated, r + 0.9 * after * ~terminated
    wanted = torch.zeros_like(r)
    for n in range(4):
        for t in range(30):
            k, weight, total = t, 1.0, 0.0
            while not ends[k, n] and k < 29 and q[k + 1, n] >= v[k + 1, n]:
                total += weight * r[k, n]
                k, weight = k + 1, weight * 0.9
            wanted[t, n] = total + weight * q[k, n] - v[t, n]
    assert torch.allclose(advantages.upgo(*given, gamma=0.9), wanted, atol=1e-12)


def test_group_forms_are_those_of_rloo_and_grpo():
    returns = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = (returns.sum(1, keepdim=True) - returns) / 3
    assert torch.allclose(advantages.leave_one_out(returns), returns - others)
    spread = returns.std(1, keepdim=True) + 1e-4
    assert torch.allclose(advantages.group_normalized(returns), (returns - returns.mean(1, keepdim=True)) / spread)
    assert torch.equal(advantages.group_normalized(torch.ones(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("form", [advantages.leave_one_out, advantages.group_normalized])
def test_a_group_has_at_least_two_returns_of_any_number_type(form):
    for returns in (torch.ones(3, 1), torch.ones(2, 0), torch.tensor(1.0), torch.tensor([5])):
        with pytest.raises(UserError, match=r"a group of [01] has no other return .* at least 2"):
            form(returns)
    counted = torch.tensor([[1, 2, 4], [0, 0, 1]])
    assert torch.equal(form(counted), form(counted.float()))
    assert torch.equal(form(counted > 1), form((counted > 1).float()))


def test_rewards_may_be_integers():
    rewards, ends = torch.tensor([[1], [2], [4]]), torch.tensor([[False], [False], [True]])
    assert advantages.returns_to_go(rewards, ends, 0.5).flatten().tolist() == [3.0, 4.0, 4.0]
    zeros = torch.zeros(3, 1)
    given = (rewards, zeros, zeros, ends, torch.zeros_like(ends))
    assert advantages.n_step(*given, n=3, gamma=0.5).flatten().tolist() == [3.0, 4.0, 4.0]
    assert advantages.vtrace(*given, zeros, gamma=0.5)[0].flatten().tolist() == [3.0, 4.0, 4.0]
    whole = torch.tensor([1, 2, 3])
    assert torch.equal(advantages.whitened(whole), advantages.whitened(whole.float()))


def test_whitening_is_of_what_the_mask_counts():
    g = torch.Generator().manual_seed(0)
    values, mask = 5 + 3 * torch.randn(4, 7, generator=g, dtype=torch.float64), torch.rand(4, 7, generator=g) < 0.6
    alone = values[mask]
    wanted = (alone - alone.mean()) / alone.std()
    padded = values.masked_fill(~mask, torch.nan)
    assert torch.allclose(advantages.whitened(padded, mask)[mask], wanted, atol=1e-7)
    assert torch.equal(advantages.whitened(padded, mask)[~mask], torch.zeros(int((~mask).sum())).double())
    assert torch.allclose(advantages.whitened(padded, mask, center=False)[mask], wanted + alone.mean(), atol=1e-7)
    assert torch.equal(advantages.whitened(alone), advantages.whitened(alone, torch.ones_like(alone, dtype=torch.bool)))
    assert advantages.whitened(torch.tensor([3.0])).tolist() == [0.0]


@pytest.mark.peer
def test_group_forms_are_what_trls_trainers_compute():
    """The trainers need a model, so the lines themselves run: those between the rewards and the advantages."""
    if (spec := importlib.util.find_spec("trl")) is None:
        pytest.skip("trl is not installed")

    def run_lines(file, first, last, **names):
        lines = (Path(spec.origin).parent / "trainer" / file).read_text().splitlines()
        begin = next(i for i, line in enumerate(lines) if line.strip() == first)
        end = next(i for i, line in enumerate(lines) if i > begin and line.strip() == last)
        exec(textwrap.dedent("\n".join(lines[begin : end + 1])), names)
        return names

    returns = ratios(6, 4)
    mean, deviation = "mean = torch.nanmean(tensor, dim=dim, keepdim=True)", "std = torch.sqrt(variance)"
    found = run_lines("utils.py", mean, deviation, torch=torch, tensor=returns, dim=1)  # the body of nanstd
    given = {"torch": torch, "rewards": returns.flatten(), "num_generations": 4}
    given["nanstd"] = lambda x, dim: found["std"].squeeze(dim)
    given["self"] = SimpleNamespace(scale_rewards="group")
    grpo = run_lines(
        "grpo_trainer.py",
        "mean_grouped_rewards = torch.nanmean(rewards.view(-1, num_generations), dim=1)",
        "advantages = advantages / (std_rewards + 1e-4)",
        **given,
    )
    rloo = run_lines(
        "rloo_trainer.py", "grouped_rewards = rewards.view(-1, num_generations)", "advantages = rewards - baselines",
        **given,
    )  # fmt: skip
    assert torch.allclose(advantages.group_normalized(returns).flatten(), grpo["advantages"], atol=1e-12)
    assert torch.allclose(advantages.leave_one_out(returns).flatten(), rloo["advantages"], atol=1e-12)


def test_token_rewards_are_the_penalty_of_each_and_the_score_with_the_last():
    log_probs, reference = -ratios(5, 3).abs(), -ratios(5, 3).flip(0).abs()
    lengths, scores = [5, 1, 3], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mask = torch.arange(5)[:, None] < torch.tensor(lengths)
    wanted = torch.zeros(5, 3, dtype=torch.float64)
    for n, length in enumerate(lengths):
        for t in range(length):
            wanted[t, n] = -0.1 * (log_probs[t, n] - reference[t, n])
        wanted[length - 1, n] += scores[n]
    last = advantages.last_token(mask)
    found = advantages.token_rewards(scores, log_probs, reference, last, 0.1)
    assert torch.allclose(found[mask], wanted[mask], atol=1e-12)


def test_welford_is_numpys_far_from_zero():
    x = 1e8 + np.random.default_rng(0).normal(size=(1000, 2))
    found = Welford(2)
    for piece in np.array_split(x, [1, 7, 400]):
        found.add(torch.from_numpy(piece))
    assert np.allclose(found.mean, x.mean(0), rtol=1e-15)
    assert np.allclose(found.variance(), x.var(0), rtol=1e-6)  # Σ x² − (Σ x)² would have no digit of it


@pytest.mark.peer
def test_reward_scale_is_that_of_stable_baselines3():
    peer = pytest.importorskip("stable_baselines3.common.vec_env")
    import gymnasium

    theirs = peer.VecNormalize(
        peer.DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 4), gamma=0.9, clip_reward=1.5
    )
    theirs.ret_rms.count = 0.0  # begins with a count of 1e-4 at the variance 1
    rewards, _, _, terminated, _ = numbers(60, 4)
    mine = RewardScale(4, 0.9, clip=1.5)
    found = torch.cat([mine(rewards[a:b], terminated[a:b]) for a, b in ((0, 25), (25, 60))]).numpy()
    for t in range(60):  # as in its step_wait
        theirs._update_reward(rewards[t].numpy())
        assert np.allclose(found[t], theirs.normalize_reward(rewards[t].numpy()), atol=1e-6)
        theirs.returns[terminated[t].numpy()] = 0
    assert abs(found).max() == 1.5


# --- PPO's losses


def test_slopes_that_are_written_out_are_autograds():
    """Inside and outside both clips, on either side, and with nothing to keep near to."""
    g = torch.Generator().manual_seed(0)
    x, A, targets, old = (torch.randn(400, generator=g) for _ in range(4))
    x.requires_grad_()
    for found, wanted in (
        (surrogate.clipped_with_slope(x, A, 0.2), surrogate.clipped_surrogate(x, A, 0.2)),
        (surrogate.value_with_slope(x, targets, old, 0.2), surrogate.value_loss(x, targets, old, 0.2)),
        (surrogate.value_with_slope(x, targets), surrogate.value_loss(x, targets)),
    ):
        torch.testing.assert_close(found[0], wanted.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], torch.autograd.grad(wanted.sum(), x)[0], rtol=1e-5, atol=1e-6)
        assert 0 < (found[1] == 0).sum() < 400 or len(found[1].unique()) == 400


def test_the_clipped_surrogate_has_no_slope_where_nothing_is_to_be_gained():
    """Ratio above and below the bounds, with a good and a bad action: only two of the four are cut off."""
    log_ratios = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    A = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = surrogate.clipped_surrogate(log_ratios, A, 0.2)
    assert torch.allclose(loss, torch.tensor([-1.2, 1.5, -0.5, 0.8]))
    (slope,) = torch.autograd.grad(loss.sum(), log_ratios)
    assert torch.allclose(slope, torch.tensor([0.0, 1.5, -0.5, 0.0]))
    even = torch.zeros(4, requires_grad=True)
    assert not torch.autograd.grad(surrogate.clipped_surrogate(even, A, 0.0).sum(), even)[0].any()


def test_what_is_watched_during_ppo():
    """The estimate of the KL, averaged over actions of the old policy, is the KL; it is never negative."""
    old, new = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    estimates = surrogate.approximate_kl(new - old)
    assert float(estimates.min()) >= 0
    assert torch.allclose(old.exp() @ estimates, networks.Categorical.kl(old, new))
    assert float(surrogate.clip_fraction(torch.tensor([1.0, 1.1, 1.3, 0.7]).log(), 0.2)) == 0.5
    targets = torch.arange(5.0)
    assert float(surrogate.explained_variance(targets + 3, targets)) == 1
    assert float(surrogate.explained_variance(torch.ones(5), targets)) == 0
    assert surrogate.explained_variance(targets, torch.ones(5)).isnan()


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("clip_value", [None, 0.2])
def test_ppos_losses_and_gradient_are_torchrls(clip_value):
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.modules import ValueOperator
    from torchrl.objectives import ClipPPOLoss

    torch.manual_seed(0)
    policy, value = networks.Categorical(3, 4, [8]), networks.Value(3, [8])
    net = TensorDictModule(policy.net, in_keys=["observation"], out_keys=["logits"])
    sampler = ProbabilisticTensorDictModule(
        in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )  # fmt: skip
    critic = ValueOperator(value.net, in_keys=["observation"])
    theirs = ClipPPOLoss(ProbabilisticTensorDictSequential(net, sampler), critic, clip_epsilon=0.2, entropy_coeff=0.01,
                         critic_coeff=0.5, loss_critic_type="l2", clip_value=clip_value)  # fmt: skip
    observations, actions = torch.randn(60, 3), torch.randint(4, (60,))
    A, targets, old_values = torch.randn(60), torch.randn(60), 0.3 * torch.randn(60)
    params = policy(observations)
    log_probs = policy.log_prob(params, actions)
    old = log_probs.detach() + 0.5 * torch.randn(60)
    data = TensorDict(
        {"observation": observations, "action": actions, "action_log_prob": old, "advantage": A[:, None],
         "value_target": targets[:, None], "state_value": old_values[:, None]}, [60]
    )  # fmt: skip
    found = theirs(data)
    mine = {
        "loss_objective": surrogate.clipped_surrogate(log_probs - old, A, 0.2).mean(),
        "loss_critic": 0.5 * surrogate.value_loss(
            value(observations), targets, None if clip_value is None else old_values
        ).mean(),
        "loss_entropy": -0.01 * policy.entropy(params).mean(),
    }  # fmt: skip
    for name, loss in mine.items():
        assert torch.allclose(loss, found[name], atol=1e-6), name
    parameters = [*policy.parameters(), *value.parameters()]
    ours = torch.autograd.grad(sum(mine.values()), parameters)
    sum(found[name] for name in mine).backward()
    for a, p in zip(ours, parameters, strict=True):
        assert torch.allclose(a, p.grad, atol=1e-6)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.1, 0.01], [1.0] * 40])
def test_a_sum_of_squares_passes_3_as_often_as_a_normal_number_does(weights):
    rng, v = np.random.default_rng(5), np.array(weights)
    off = rng.standard_normal((200_000, len(v))) * np.sqrt(v)
    for found in (chi_square_z(off, np.broadcast_to(v, off.shape)), chi_square_z_correlated(off, np.diag(v))):
        for bar, often in ((2, 0.0228), (3, 0.00135)):
            assert (found > bar).mean() == pytest.approx(often, rel=0.25)


def test_moments_are_numpys_and_know_what_chance_does():
    rng = np.random.default_rng(0)
    cells, values = torch.from_numpy(rng.integers(0, 5, 4000)), torch.from_numpy(rng.normal(2.0, 3.0, (2, 4000)))
    found = Moments(2, 6)
    found.add(cells[:1000], values[:, :1000])
    found.add(cells[1000:], values[:, 1000:])
    for k in range(5):
        mine = values[:, cells == k].numpy()
        assert np.allclose(found.mean()[:, k], mine.mean(1))
        assert np.allclose(found.variance()[:, k], mine.var(1, ddof=1))
    assert np.isinf(found.variance()[:, 5]).all()
    assert abs(chi_square_z(found.mean() - 2.0, found.variance_of_mean())).max() < 4
    assert chi_square_z(found.mean() - 2.5, found.variance_of_mean()).min() > 6


# --- Policies, episodes, intervals


def test_categorical_is_torchs():
    torch.manual_seed(0)
    params, other = (torch.randn(500, 4).log_softmax(-1) for _ in range(2))
    theirs, others = (torch.distributions.Categorical(logits=p) for p in (params, other))
    actions = networks.Categorical.sample(params, torch.Generator().manual_seed(0))
    assert torch.allclose(networks.Categorical.log_prob(params, actions), theirs.log_prob(actions))
    assert torch.allclose(networks.Categorical.entropy(params), theirs.entropy(), atol=1e-6)
    assert torch.allclose(
        networks.Categorical.kl(params, other), torch.distributions.kl_divergence(theirs, others), atol=1e-5
    )
    many = networks.Categorical.sample(params[:1].expand(100_000, 4), torch.Generator().manual_seed(1))
    assert (many.bincount(minlength=4) / 100_000 - params[0].exp()).abs().max() < 0.01


def test_gaussian_is_torchs():
    torch.manual_seed(0)
    params, other = (torch.randn(50, 6) for _ in range(2))
    theirs, others = (
        torch.distributions.Independent(torch.distributions.Normal(p[:, :3], p[:, 3:].exp()), 1)
        for p in (params, other)
    )
    actions = networks.Gaussian.sample(params, torch.Generator().manual_seed(0))
    assert torch.allclose(networks.Gaussian.log_prob(params, actions), theirs.log_prob(actions), atol=1e-5)
    assert torch.allclose(networks.Gaussian.entropy(params), theirs.entropy(), atol=1e-5)
    kl = torch.distributions.kl_divergence(theirs, others)
    assert torch.allclose(networks.Gaussian.kl(params, other), kl, rtol=1e-4, atol=1e-4)


def test_whole_episodes_are_those_of_gymnasium():
    envs = environments.make("CartPole-v1", 3)
    pushes = torch.tensor([0, 1, 1, 0])
    count = iter(range(1000))
    rollout = environments.play(envs, lambda seen: pushes[next(count) % 4].expand(len(seen)), [5, 6, 7])
    alive = rollout.first_episode
    for i, seed in enumerate([5, 6, 7]):
        env = environments.make("CartPole-v1", 1)[0]
        seen, _ = env.reset(seed=seed)
        for t in range(1000):
            assert np.array_equal(rollout.observations[t, i].numpy(), seen)
            seen, reward, terminated, truncated, _ = env.step(int(pushes[t % 4]))
            assert rollout.rewards[t, i] == reward
            assert np.array_equal(rollout.next_observations[t, i].numpy(), seen)
            assert bool(rollout.terminated[t, i]) == terminated
            assert bool(rollout.truncated[t, i]) == truncated
            if terminated or truncated:
                break
        assert alive[:, i].sum() == t + 1
        assert rollout.rewards[t + 1 :, i].sum() == 0


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.303 * np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert interval([3.0])[1] == float("inf")
    rng = np.random.default_rng(0)
    inside = [abs(m) <= h for m, h in (interval(rng.normal(size=5).tolist()) for _ in range(4000))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
