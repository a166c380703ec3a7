"""Stage 3 of the module rlhf on the enumerated problem: with the true reward and a learned one; best-of-n."""

import dataclasses
import math

import pytest
import torch

from finetune.alignment import gibbs
from finetune.alignment.gibbs import Problem
from finetune.alignment.reward_model import pair_loss
from finetune.runs import registry

rlhf = registry.load(registry.find("rlhf"))
policy = registry.part("rlhf", "policy")
BETA = 0.5


def problem(seed):
    """36 sequences of two tokens."""
    return Problem.random(torch.Generator().manual_seed(seed), vocabulary=6, length=2)


def optimized(p, rewards, kind, seed=0, steps=300, size=1024, lr=0.05):
    """The policy (log π of all sequences) that stage 3 makes of the reference with `rewards` (S,)."""
    cfg = dataclasses.replace(rlhf.Config.toy(), policy=kind, beta=BETA, new_tokens=p.sequences.mask.shape[1])
    trained, g = p.policy(), torch.Generator().manual_seed(seed)
    values = torch.zeros(p.sequences.count, dtype=torch.float64, requires_grad=True)
    reference = p.policy().token_logprobs().detach()
    optimizer = torch.optim.Adam([*trained.parameters(), values], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        rows = trained.sample(size, g)
        mask = p.sequences.mask[rows]
        owner = torch.arange(size)[:, None].expand_as(mask)[mask]
        rollout = policy.Rollout(owner, reference[rows][mask], rewards[rows], group=size)
        logprobs, v = trained.token_logprobs(rows)[mask], values[p.sequences.nodes[rows][mask]]
        prepared = policy.prepare(cfg, BETA, rollout, logprobs, v)
        loss, _ = policy.loss_of(cfg, BETA, prepared, logprobs, v)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return trained.sequence_logprobs().detach()


def learned(p, seed):
    """A table of rewards from 20,000 pairs of the reference's sequences, by the loss of stage 2."""
    chosen, rejected = p.preferences(20_000, torch.Generator().manual_seed(seed))
    table = torch.zeros(len(p.rewards), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        pair_loss(table[chosen], table[rejected]).backward()
        optimizer.step()
    return table.detach()


@pytest.mark.parametrize("kind", ["ppo", "rloo"])
def test_the_true_reward_ends_at_the_optimum(kind):
    """The KL is in the reward: nothing is biased."""
    p = problem(1)
    start = gibbs.kl(p.reference_logprobs, p.optimum(BETA))
    end = gibbs.kl(optimized(p, p.rewards, kind), p.optimum(BETA))
    assert start > 0.5
    assert end <= 0.01


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_reward_learned_from_pairs_ends_near_it(seed):
    p = problem(seed)
    assert gibbs.kl(p.reference_logprobs, p.optimum(BETA)) > 0.3
    assert gibbs.kl(optimized(p, learned(p, seed), "rloo", seed), p.optimum(BETA)) <= 0.1


@pytest.mark.parametrize("kind", ["ppo", "rloo", "grpo", "best_of_n"])
def test_a_constant_reward_leaves_the_policy_at_the_reference(kind):
    p = problem(1)
    end = optimized(p, torch.zeros_like(p.rewards), kind, steps=20)
    assert gibbs.kl(end, p.reference_logprobs) < 1e-6


def best_of(logprobs, rewards, n):
    """Exactly: log of the distribution of the best of n, of rewards that all differ."""
    order = rewards.argsort()
    below = logprobs[order].exp().cumsum(0)
    p = below**n - torch.cat([below.new_zeros(1), below[:-1]]) ** n
    found = torch.empty_like(p)
    found[order] = p.clamp(min=1e-300).log()
    return found


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_kl_of_the_best_of_n(n):
    """Of thousands of sequences, none likely, it is ln n − (n − 1) / n; of few it is less."""
    g = torch.Generator().manual_seed(0)
    many = Problem.random(g, vocabulary=8, length=4)
    many = dataclasses.replace(many, reference_logits=0.1 * many.reference_logits)
    formula = math.log(n) - (n - 1) / n
    assert rlhf.best_of_n_kl(n) == pytest.approx(formula)
    exact = gibbs.kl(best_of(many.reference_logprobs, many.rewards, n), many.reference_logprobs).item()
    assert exact == pytest.approx(formula, rel=0.02)
    few = problem(0)
    assert gibbs.kl(best_of(few.reference_logprobs, few.rewards, n), few.reference_logprobs) < formula
