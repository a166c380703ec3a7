"""The advantage module: gradients against automatic differentiation, the optimal baseline, the run and its controls."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from resumed import resumes_to_the_same_bytes

from finetune.errors import UserError
from finetune.rl.advantages import group_normalized, leave_one_out, whitened
from finetune.rl.agents.reward_scale import RewardScale
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.sample import sample_tabular
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("advantage")
advantage = registry.load(INFO)
estimators, gradients, rescaling, dueling, token_credit = (
    registry.part("advantage", name) for name in ("estimators", "gradients", "rescaling", "dueling", "token_credit")
)


def toy(**changes):
    return dataclasses.replace(advantage.Config.toy(), threads=1, **changes)


def case():
    rng = np.random.default_rng(0)
    mdp = tables.garnet(5, 3, 2, rng, 0.9, ending=0.1)
    return mdp, rng.normal(size=(6, 3))


def test_the_exact_gradient_is_that_of_the_performance():
    """Autograd through V = (I − γ P_π)⁻¹ R_π."""
    mdp, logits = case()
    theta = torch.tensor(logits, requires_grad=True)
    policy = theta.softmax(1)
    P = torch.einsum("sa,sat->st", policy, torch.tensor(mdp.P))
    V = torch.linalg.solve(torch.eye(6) - mdp.gamma * P, (policy * torch.tensor(mdp.R)).sum(1))
    (torch.tensor(mdp.start) @ V).backward()
    found = gradients.exact_gradient(mdp, policy.detach().numpy(), 2000)
    assert np.allclose(found, theta.grad.numpy(), atol=1e-12)


def test_no_baseline_leaves_less_variance_than_the_optimal_one():
    mdp, logits = case()
    policy = torch.tensor(logits).softmax(1).numpy()
    V = tables.solve(mdp, policy)
    Q = tables.action_values(mdp, V)
    length = 1 - 2 * policy + (policy**2).sum(1, keepdims=True)

    def left(b):
        return (policy * length * (Q - b[:, None]) ** 2).sum(1)

    best = gradients.optimal_baseline(mdp, policy, V)
    for other in (V, best + 0.01, best - 0.01, np.zeros(6)):
        assert (left(best) <= left(other) + 1e-12).all()
    assert left(best)[:5].sum() < left(V)[:5].sum()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_gradient_of_rescaled_batches_is_that_of_every_batch_through_the_library(seed):
    """All 6³ batches of three pairs, and all 3³ groups of three actions, each through what training would call."""
    policy, rewards = rescaling.problem(np.random.default_rng(seed))
    chance, r = torch.from_numpy(policy / 2).flatten(), torch.from_numpy(rewards).flatten()
    A = (torch.from_numpy(rewards) - torch.from_numpy((policy * rewards).sum(1))[:, None]).flatten()

    def scaled(x):
        return RewardScale(1, 0.9)(x[:, None], torch.ones(3, 1, dtype=torch.bool))[-1:, 0] * 3  # the last of three

    def mean(f, kinds, p, x):
        total = torch.zeros(len(x), dtype=torch.float64)
        for batch in product(kinds, repeat=3):
            factors, at = f(x[list(batch)]), list(batch)
            taken = at[-1:] if len(factors) == 1 else at
            total.index_add_(0, torch.tensor(taken), p[at].prod() * factors / 3)
        return total

    whole = {"centered": (lambda x: x - x.mean(), A), "whitened": (whitened, A), "scaled_rewards": (scaled, r)}
    found = {name: mean(f, range(6), chance, x) for name, (f, x) in whole.items()}
    for f in (leave_one_out, group_normalized):
        found[f.__name__] = sum(mean(f, group, 2 * chance, r) for group in (range(3), range(3, 6))) / 2
    for name, weights in found.items():
        wanted = rescaling.through_softmax(weights.view(2, 3).numpy(), policy)
        assert np.allclose(rescaling.mean_gradient(name, 3, policy, rewards), wanted, atol=1e-10), name
    exact = rescaling.exact(policy, rewards)
    assert np.allclose(rescaling.mean_gradient("leave_one_out", 3, policy, rewards), exact, atol=1e-12)
    assert np.allclose(rescaling.mean_gradient("centered", 3, policy, rewards), exact * 2 / 3, atol=1e-12)
    off = {
        name: [rescaling.angle(rescaling.mean_gradient(name, n, policy, rewards), exact) for n in (4, 16)]
        for name in found
    }
    for name in ("whitened", "scaled_rewards"):
        assert off[name][1] < 0.6 * off[name][0], "the direction comes back as the batch grows"
    assert off["group_normalized"][1] > 0.6 * off["group_normalized"][0], "that of a group does not"


def sampled(policy_is_behavior):
    """A batch of random rollouts for the estimators, and their MDP."""
    mdp, logits = case()
    policy, rng = torch.tensor(logits).softmax(1).numpy(), np.random.default_rng(1)
    behavior = policy if policy_is_behavior else tables.uniform(mdp)
    rollout = sample_tabular(mdp, behavior, 30, np.repeat(np.arange(5), 4), rng)
    return estimators.Batch.of(toy(group=4), mdp, rollout, policy, behavior, rng.normal(size=6))


def test_on_policy_importance_sampling_and_vtrace_are_monte_carlo():
    """With μ = π all ratios are 1."""
    batch = sampled(policy_is_behavior=True)
    mc = estimators.mc(batch)
    assert torch.allclose(estimators.importance(batch), mc, atol=1e-12)
    assert torch.allclose(estimators.vtrace(batch), mc, atol=1e-12)


def test_importance_sampling_is_the_sum_of_rewards_times_products_of_ratios():
    """By definition: Σ γ^t (Π_{k=1..t} π/μ) δ_t, where the ratio of the first action is divided out."""
    batch = sampled(policy_is_behavior=False)
    T, N = batch.rewards.shape
    expected, ends = torch.zeros(N, dtype=torch.float64), batch.terminated | batch.truncated
    for n in range(N):
        weight = 1.0
        for t in range(T):
            weight *= 1.0 if t == 0 else 0.9 * float(batch.log_ratios[t, n].exp())
            bootstrap = 0.0 if batch.terminated[t, n] else 0.9 * batch.next_values[t, n]
            expected[n] += weight * (batch.rewards[t, n] + bootstrap - batch.values[t, n])
            if ends[t, n]:
                break
    assert torch.allclose(estimators.importance(batch), expected, atol=1e-10)


def test_only_with_a_mean_does_q_identify_value_and_advantage():
    mdp, logits = case()
    policy = torch.tensor(logits).softmax(1).numpy()[:5]
    Q = tables.action_values(mdp, tables.solve(mdp, np.vstack([policy, np.eye(3)[:1]])))[:5]
    V = (policy * Q).sum(1)
    for form, value in (("policy_mean", V), ("mean", Q.mean(1))):
        for seed in range(2):
            v, a = dueling.fit(form, Q, policy, np.random.default_rng(seed))
            assert np.allclose(v, value, atol=1e-9)
            assert np.allclose(a, Q - value[:, None], atol=1e-9)
    fits = [dueling.fit("none", Q, policy, np.random.default_rng(seed)) for seed in range(2)]
    for v, a in fits:
        assert np.allclose(v[:, None] + a, Q, atol=1e-9)
    assert abs(fits[0][0] - fits[1][0]).max() > 0.1, "the start decides"


def test_advantages_of_tokens_are_those_of_the_tree_as_an_mdp():
    """The same tree as a table: a state for each sequence of tokens without an end, one more for the end."""
    length, beta = 4, 0.3
    found = token_credit.answers(length, beta, np.random.default_rng(5))
    assert abs(float(found.chance.sum()) - 1) < 1e-12
    T, N = found.tokens.shape
    names = sorted({tuple(found.tokens[:t, n].tolist()) for n in range(N) for t in range(T) if found.mask[t, n]})
    S, end = len(names) + 1, len(names)
    P, R, policy = np.zeros((S, 3, S)), np.zeros((S, 3)), np.zeros((S, 3))
    P[end, :, end], policy[end] = 1, 1 / 3
    for t in range(T):
        for n in range(N):
            if found.mask[t, n]:
                so_far, a = tuple(found.tokens[:t, n].tolist()), int(found.tokens[t, n])
                s = names.index(so_far)
                P[s, a] = np.eye(S)[end if found.last[t, n] else names.index((*so_far, a))]
                R[s, a] = found.rewards[t, n]
                passing = [found.chance[(found.tokens[: len(p)] == torch.tensor(p)[:, None]).all(0)].sum()
                           for p in (so_far, (*so_far, a))]  # fmt: skip
                policy[s, a] = passing[1] / passing[0]
    mdp = tables.make(P, R, 1.0, terminal=np.arange(S) == end)
    A = tables.advantages(mdp, policy)
    for t in range(T):
        for n in range(N):
            if found.mask[t, n]:
                s = names.index(tuple(found.tokens[:t, n].tolist()))
                assert abs(A[s, found.tokens[t, n]] - found.advantages[t, n]) < 1e-12
    every = token_credit.estimates(found, 0.9, 0.9)
    bias = {name: token_credit.bias_seen(found, x) for name, x in every.items()}
    assert max(bias[name] for name in ("td", "gae", "mc", "whole")) < 1e-12
    assert min(bias[name] for name in ("td_rough", "gae_rough", "discounted")) > 1e-3


def test_the_toy_reaches_its_targets(tmp_path):
    summary = execute(INFO, toy(), tmp_path / "run", toy=True)
    assert summary["passed"], summary["reached"]
    std = {name: summary["checks"][f"std_{name}"]["value"] for name in ("td", "mc", "importance")}
    assert std["td"] < summary["metrics"]["std_gae"] < std["mc"] < std["importance"]
    for name in ("estimators", "error_over_samples", "gradient_variance", "rescaling", "token_credit"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("change", [{"steps": 0}, {"shuffle_rewards": True}])
def test_without_steps_or_rewards_nothing_is_gained(change, tmp_path):
    summary = execute(INFO, toy(**{"steps": 30} | change), tmp_path / "run", toy=True)
    assert not summary["reached"]["gain_gae"]
    assert abs(summary["metrics"]["gain_gae"]) < 0.3


def test_a_cut_run_resumes(tmp_path, no_pictures):
    resumes_to_the_same_bytes(INFO, toy(steps=2, length=8, groups=2, checkpoint_every=1), tmp_path, 2)


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_rewards_in_another_unit_have_the_same_bias_and_noise(factor, tmp_path, no_pictures):
    mdp = tables.garnet(6, 3, 2, np.random.default_rng(0), 0.9, mean=1.0, ending=0.02)
    found = {}
    for unit in (1.0, factor):
        np.savez(tmp_path / "mdp.npz", P=mdp.P, R=unit * mdp.rewards)
        config = toy(data=tmp_path / "mdp.npz", steps=20, groups=4)
        summary = execute(INFO, config, tmp_path / f"{unit}", toy=True)
        assert summary["passed"], summary["checks"]
        assert summary["metrics"]["gain_gae"] > 0.8
        found[unit] = np.array([summary["metrics"][name] / unit for name in ("bias_gae", "std_gae")])
    assert np.allclose(found[factor], found[1.0])


def test_bad_settings_are_refused():
    for change, message in (
        ({"group": 1}, "--group 1 is too small"),
        ({"actions": 1}, "--actions 1 is too small"),
        ({"gamma": 1.0}, "--gamma 1"),
        ({"tokens": 3}, "--tokens 3 is too small"),
        ({"beta": -1.0}, "--beta -1 is too small"),
        ({"lam": -0.5}, "--lam -0.5 is too small"),
    ):
        with pytest.raises(UserError, match=message):
            toy(**change)


def test_a_world_without_chance_has_results_too(tmp_path):
    """One action, no branching, rewards of a hundred million: nothing varies, what is left is rounding."""
    P = np.zeros((3, 1, 3))
    P[[0, 1, 2], 0, [1, 2, 0]] = 1
    np.savez(tmp_path / "one.npz", P=P, R=1e8 * np.array([[1.0], [0.3], [-2.0]]))
    config = toy(data=tmp_path / "one.npz", steps=3, groups=1)
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    assert summary["passed"], summary["reached"]
    assert summary["checks"]["std_mc"]["value"] == 0
