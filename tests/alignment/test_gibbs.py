"""The enumerated problem: its solution is the best policy, and the sums are exact."""

import math

import pytest
import torch

from finetune.alignment.gibbs import Policy, Problem, Sequences, expectation, kl

BETA = 0.5


def problem(seed: int = 0, **kwargs) -> Problem:
    return Problem.random(torch.Generator().manual_seed(seed), **kwargs)


@pytest.mark.parametrize(("end", "count"), [(None, 3**4), (2, 1 + 2 + 4 + 8 * 3)])
def test_all_sequences_are_there_once(end: int | None, count: int):
    sequences = Sequences.all(3, 4, end)
    texts = {tuple(t[m].tolist()) for t, m in zip(sequences.tokens, sequences.mask, strict=True)}
    assert len(texts) == len(sequences.tokens) == count
    for text in texts:
        assert len(text) == 4 or text[-1] == end
        assert end not in text[:-1]
    # beginnings: those of 0 to 3 tokens without the end token
    assert sequences.count == sum((3 if end is None else 2) ** n for n in range(4))


@pytest.mark.parametrize("end", [None, 0])
def test_probabilities_add_up_to_one(end: int | None):
    policy = problem(vocabulary=4, length=3, end=end).policy()
    assert policy.sequence_logprobs().exp().sum().item() == pytest.approx(1)
    rows = torch.tensor([5, 0, 5])
    assert torch.equal(policy.token_logprobs(rows), policy.token_logprobs()[rows])
    assert (policy.token_logprobs()[~policy.sequences.mask] == 0).all()


def test_optimum_is_the_solution():
    found = problem(1, end=0, length=3, vocabulary=4)
    best = found.optimum(BETA)
    value = found.objective(best, BETA)
    z = expectation(found.reference_logprobs, (found.rewards / BETA).exp())
    assert value.item() == pytest.approx(BETA * math.log(z))
    for seed in range(3):  # the loss of any other policy is its divergence
        other = Policy(found.sequences, problem(seed + 2, end=0, length=3, vocabulary=4).reference_logits)
        logprobs = other.sequence_logprobs().detach()
        lost = value - found.objective(logprobs, BETA)
        assert lost.item() == pytest.approx(BETA * kl(logprobs, best).item())
        assert lost > 0.01


def test_ascent_of_the_objective_reaches_the_optimum():
    found = problem(2)
    policy = found.policy()
    start = kl(policy.sequence_logprobs(), found.optimum(BETA)).item()
    optimizer = torch.optim.LBFGS(policy.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -found.objective(policy.sequence_logprobs(), BETA)
        value.backward()
        return value

    optimizer.step(loss)
    end = kl(policy.sequence_logprobs(), found.optimum(BETA)).item()
    assert start > 0.3
    assert end < 1e-6


def test_samples_follow_the_policy():
    policy = problem(3, end=1).policy()
    rows = policy.sample(100_000, torch.Generator().manual_seed(0))
    p = policy.sequence_logprobs().exp().detach()
    shares = torch.bincount(rows, minlength=len(p)) / len(rows)
    deviations = (shares - p) / (p * (1 - p) / len(rows)).sqrt()
    assert deviations.abs().max() < 4.5


@pytest.mark.parametrize("flipped", [0.0, 0.2])
def test_preferences_follow_bradley_and_terry(flipped: float):
    found = problem(4)
    chosen, rejected = found.preferences(200_000, torch.Generator().manual_seed(1), flipped)
    assert (chosen != rejected).all()
    margin = found.rewards[chosen] - found.rewards[rejected]
    for low, high in ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 4.0)):
        right = ((margin > low) & (margin < high)).sum()
        wrong = ((margin < -low) & (margin > -high)).sum()
        sizes = margin[(margin.abs() > low) & (margin.abs() < high)].abs()
        p = torch.sigmoid(sizes).mean().item() * (1 - 2 * flipped) + flipped
        total = (right + wrong).item()
        assert abs(right.item() / total - p) < 4.5 * math.sqrt(p * (1 - p) / total)
