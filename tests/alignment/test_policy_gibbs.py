"""Policy losses on the enumerated problem: where they end, next to the solution that theory gives."""

import math

import pytest
import torch
from torch import Tensor

from finetune.alignment import group_advantages
from finetune.alignment import kl as kl_terms
from finetune.alignment.gibbs import Policy, Problem, expectation, kl
from finetune.alignment.policy_loss import Answers, Settings, Totals, policy_loss

BETA = 0.5
SIZE = 64  # answers of a step


def answers_of(policy: Policy, problem: Problem, rows: Tensor, advantages: Tensor) -> Answers:
    mask = policy.sequences.mask[rows]
    logprobs = policy.token_logprobs(rows)[mask]
    reference = problem.policy().token_logprobs(rows)[mask].detach()
    owner = torch.arange(len(rows)).repeat_interleave(mask.sum(1))
    return Answers(logprobs, logprobs.detach(), owner, advantages, reference=reference)


def trained(problem: Problem, s: Settings, seed: int, lr: float = 0.03, steps: int = 400) -> Policy:
    """After steps of one group each, with a rate that falls to 0."""
    policy, generator = problem.policy(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    longest = policy.sequences.tokens.shape[1]
    for step in range(steps):
        rows = policy.sample(SIZE, generator)
        a = group_advantages.advantages(problem.rewards[rows][None], "leave_one_out")[0]
        found = answers_of(policy, problem, rows, a)
        policy_loss(found, Totals.of(found.owner, SIZE, longest), s).loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return policy


def exact(problem: Problem, ratio: bool, steps: int = 800) -> Policy:
    """Where the loss leads without noise: every answer with its probability instead of samples."""
    policy = problem.policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    for step in range(steps):
        logprobs = policy.sequence_logprobs()
        p = logprobs.detach().exp()
        ratios = (logprobs - logprobs.detach()).exp() if ratio else None
        terms = BETA * kl_terms.estimate("k3", logprobs, problem.reference_logprobs, ratios)
        (p * (terms - problem.rewards * logprobs)).sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return policy


def distance(problem: Problem, policy: Policy) -> float:
    return kl(policy.sequence_logprobs(), problem.optimum(BETA)).item()


def interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean of five (Student's t)."""
    x = torch.tensor(values, dtype=torch.float64)
    half = 2.776 * x.std().item() / math.sqrt(len(x))
    return x.mean().item() - half, x.mean().item() + half


def problem_of(seed: int) -> Problem:
    """36 answers of one token: a token's KL is the answer's."""
    return Problem.random(torch.Generator().manual_seed(seed), vocabulary=36, length=1)


def test_k3_with_the_ratio_ends_at_the_optimum():
    """KL(π ‖ π*) ≤ 0.06, from rewards of samples alone, and the reward rises to that of π*."""
    for seed in range(3):
        problem = problem_of(seed)
        policy = trained(problem, Settings(mean="sum", kl_weight=BETA), seed)
        assert distance(problem, policy) <= 0.06
        reached = expectation(policy.sequence_logprobs(), problem.rewards).item()
        best = expectation(problem.optimum(BETA), problem.rewards).item()
        assert reached > best - 0.15
        assert distance(problem, problem.policy()) > 0.3  # where it began


@pytest.mark.long
@pytest.mark.parametrize("lr", [0.01, 0.03, 0.1])
def test_plain_k3_is_biased_over_seeds_and_learning_rates(lr: float):
    """The intervals of KL(π ‖ π*) over five seeds do not touch, whatever the learning rate: it is no slow convergence.
    Its gradient is that of KL(π_ref ‖ π)."""
    found = {
        ratio: [
            distance(p, trained(p, Settings(mean="sum", kl_weight=BETA, kl_ratio=ratio), seed, lr, 1000))
            for seed, p in ((seed, problem_of(seed)) for seed in range(5))
        ]
        for ratio in (True, False)
    }
    assert interval(found[True])[1] < interval(found[False])[0]
    assert interval(found[False])[0] > 0.06


def test_plain_k3_is_biased_without_noise_too():
    """Over five problems, with no sampling at all."""
    with_ratio, plain = ([distance(p, exact(p, ratio)) for p in map(problem_of, range(5))] for ratio in (True, False))
    assert max(with_ratio) < 0.01
    assert interval(plain)[0] > 0.06


def test_a_token_of_an_answer_is_not_charged_for_those_behind_it():
    """Of answers of two tokens the KL in the loss is a sum over tokens whose gradients do not know that the first
    chooses what the second will cost. In the reward the whole of it is charged, and the end is right."""
    problem = Problem.random(torch.Generator().manual_seed(0))
    inside = trained(problem, Settings(mean="sum", kl_weight=BETA), 0, steps=500)
    policy, generator = problem.policy(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    for step in range(500):
        rows = policy.sample(SIZE, generator)
        cost = (policy.sequence_logprobs(rows) - problem.reference_logprobs[rows]).detach()
        a = group_advantages.advantages((problem.rewards[rows] - BETA * cost)[None], "leave_one_out")[0]
        found = answers_of(policy, problem, rows, a)
        policy_loss(found, Totals.of(found.owner, SIZE, 2), Settings(mean="sum")).loss.backward()
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 500)
        optimizer.step()
        optimizer.zero_grad()
    assert distance(problem, policy) <= 0.06
    assert distance(problem, inside) > 0.2


def test_a_constant_reward_has_no_gradient():
    problem = problem_of(0)
    policy = problem.policy()
    rows = policy.sample(SIZE, torch.Generator().manual_seed(0))
    for kind in group_advantages.KINDS:
        a = group_advantages.advantages(torch.full((1, SIZE), 0.3, dtype=torch.float64), kind)[0]  # type: ignore[arg-type]
        found = answers_of(policy, problem, rows, a)
        policy_loss(found, Totals.of(found.owner, SIZE, 2), Settings()).loss.backward()
        assert not policy.logits.grad.any()


def test_wrong_answers_grow_under_the_mean_over_tokens():
    """The length bias (Liu et al. 2025, §3.1), exactly: of wrong answers that are one to four tokens long and equally
    bad, the mean over an answer's tokens pushes a short one down harder, token by token. Under dr_grpo all alike."""
    from finetune.alignment.gibbs import Sequences

    sequences = Sequences.all(3, 4, end=0)
    lengths = sequences.mask.sum(1)
    right = int((lengths == 1).nonzero()[0])  # the end token at once; everything else is wrong
    problem = Problem(
        sequences, torch.zeros(sequences.count, 3, dtype=torch.float64), torch.zeros(len(lengths)).double()
    )
    problem.rewards[right] = 1.0
    grown = {}
    for mean in ("grpo", "dr_grpo"):
        policy, generator = problem.policy(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
        for _ in range(60):
            rows = policy.sample(SIZE, generator)
            wrong = rows[rows != right]  # what happens among the wrong ones
            a = torch.full((len(wrong),), -1.0, dtype=torch.float64)
            found = answers_of(policy, problem, wrong, a)
            policy_loss(found, Totals.of(found.owner, len(wrong), 4), Settings(mean=mean)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        p = policy.sequence_logprobs().detach().exp()
        wrong = torch.arange(len(p)) != right
        grown[mean] = ((p * lengths)[wrong].sum() / p[wrong].sum()).item()
    assert grown["grpo"] > grown["dr_grpo"] + 0.1
