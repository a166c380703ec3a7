"""The losses of pairs on a problem whose solution is known, and what each must do whatever the pairs are."""

import dataclasses
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.alignment import gibbs
from finetune.alignment.gibbs import Policy, Problem
from finetune.runs import registry

losses = registry.part("dpo", "losses")
BETA = 0.5


def pairs(chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor], tokens: tuple[int, int] = (2, 2)):
    lengths = (torch.full(chosen.shape, n, dtype=chosen.dtype) for n in tokens)
    return losses.Pairs(chosen, rejected, *reference, *lengths)


def some(count: int = 64, seed: int = 0, spread: float = 1.0):
    """Random pairs in float64, of unequal lengths; the policy's numbers take gradients."""
    g = torch.Generator().manual_seed(seed)
    numbers = [-5 - 3 * torch.rand(count, generator=g, dtype=torch.float64) for _ in range(2)]
    reference = [x + spread * torch.randn(count, generator=g, dtype=torch.float64) for x in numbers]
    lengths = [torch.randint(2, 9, (count,), generator=g).double() for _ in range(2)]
    return losses.Pairs(*(x.requires_grad_() for x in numbers), *reference, *lengths)


def fit(problem: Problem, data: tuple[Tensor, Tensor], name: str, settings, steps: int) -> Policy:
    """Minimizes the mean loss over all pairs at once, with a limited number of steps: the most likely policy gives
    sequences that were seen once, and lost, no probability at all."""
    policy, reference = problem.policy(), problem.reference_logprobs
    # Equal pairs are counted once, with a weight.
    kinds, counts = torch.unique(torch.stack(data), dim=1, return_counts=True)
    weights = counts / counts.sum()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        logprobs = policy.sequence_logprobs()
        batch = pairs(logprobs[kinds[0]], logprobs[kinds[1]], (reference[kinds[0]], reference[kinds[1]]))
        (losses.LOSSES[name][1](batch, settings) * weights).sum().backward()
        optimizer.step()
    return policy


def clean_loss(policy: Policy, problem: Problem) -> float:
    """The expected loss of a pair drawn from the reference whose label is not flipped."""
    p = problem.reference_logprobs.exp()
    weights = p[:, None] * p * (1 - torch.eye(len(p)))
    h = BETA * (policy.sequence_logprobs().detach() - problem.reference_logprobs)
    m, r = h[:, None] - h, problem.rewards[:, None] - problem.rewards
    return -(2 * weights / weights.sum() * r.sigmoid() * F.logsigmoid(m)).sum().item()


def test_dpo_ends_at_the_gibbs_distribution():
    """20,000 pairs: KL(π ‖ π*) ≤ 0.05 for most seeds, and the implicit reward is the reward up to a constant."""
    found = []
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        problem = Problem.random(g)
        policy = fit(problem, problem.preferences(20_000, g), "sigmoid", losses.Settings(beta=BETA), 400)
        logprobs, best = policy.sequence_logprobs().detach(), problem.optimum(BETA)
        assert gibbs.kl(problem.reference_logprobs, best) > 0.5  # there was something to learn
        implicit = BETA * (logprobs - problem.reference_logprobs)
        assert torch.corrcoef(torch.stack([implicit, problem.rewards]))[0, 1] >= 0.95
        found.append(gibbs.kl(logprobs, best).item())
    assert statistics.median(found) <= 0.05, found
    assert max(found) <= 0.1, found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_robust_dpo_undoes_flipped_labels_where_pairs_are_many(seed: int):
    """A fifth of 20,000 labels flipped. Plain DPO fits the flipped shares, so that its margins are too small; cDPO
    expects flips on top of them and shrinks them once more; the robust loss has the mean of clean labels."""
    g = torch.Generator().manual_seed(10 + seed)
    problem = Problem.random(g)
    data, best = problem.preferences(20_000, g, flipped=0.2), problem.optimum(BETA)
    ends = {
        name: fit(problem, data, loss, losses.Settings(BETA, smoothing=e), 200)
        for name, loss, e in (("plain", "sigmoid", 0.0), ("cdpo", "sigmoid", 0.2), ("robust", "robust", 0.2))
    }
    clean = {name: clean_loss(policy, problem) for name, policy in ends.items()}
    assert clean["robust"] < clean["plain"] < clean["cdpo"]
    kl = {name: gibbs.kl(policy.sequence_logprobs().detach(), best).item() for name, policy in ends.items()}
    assert kl["robust"] < 0.3 * kl["plain"], kl


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_conservative_dpo_beats_plain_where_pairs_are_few(seed: int):
    """300 pairs, a fifth flipped, trained long: what matters is that margins stay finite. The robust loss falls
    without bound on a pair that was seen once, and is worst."""
    g = torch.Generator().manual_seed(10 + seed)
    problem = Problem.random(g)
    data = problem.preferences(300, g, flipped=0.2)
    clean = [
        clean_loss(fit(problem, data, loss, losses.Settings(BETA, smoothing=e), 1000), problem)
        for loss, e in (("sigmoid", 0.2), ("sigmoid", 0.0), ("robust", 0.2))
    ]
    assert clean == sorted(clean)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_gradients_raise_chosen_over_rejected(name: str):
    """At the reference every loss moves the margin up. (discopop's formula is flat there and rises on one side: it is
    asked where the margin is clearly negative.)"""
    batch = some(spread=0.0)
    if name == "discopop":
        batch = dataclasses.replace(batch, reference_chosen=batch.reference_chosen + 3)
    settings = losses.Settings(beta=0.1, smoothing=0.1)
    loss = losses.LOSSES[name][1](batch, settings)
    assert loss.shape == (64,)
    assert torch.isfinite(loss).all()
    up, down = torch.autograd.grad(loss.mean(), (batch.chosen, batch.rejected))
    assert (down - up).mean() > 0


@pytest.mark.parametrize("name", sorted(set(losses.LOSSES) - losses.REFERENCE_FREE))
def test_no_loss_looks_at_more_than_ratios(name: str):
    """Shifting policy and reference alike changes nothing."""
    batch, s = some(), losses.Settings(beta=0.1, smoothing=0.1)
    shift = torch.linspace(-1, 1, 64, dtype=torch.float64)
    moved = losses.Pairs(
        batch.chosen + shift, batch.rejected - shift, batch.reference_chosen + shift, batch.reference_rejected - shift,
        batch.chosen_tokens, batch.rejected_tokens,
    )  # fmt: skip
    if name == "aot":  # it sorts margins, so a shift of each changes the order
        sums = (batch.chosen, batch.rejected, batch.reference_chosen, batch.reference_rejected)
        moved = losses.Pairs(*(x + 1 for x in sums), batch.chosen_tokens, batch.rejected_tokens)
    torch.testing.assert_close(losses.LOSSES[name][1](moved, s), losses.LOSSES[name][1](batch, s))


def test_the_reference_has_loss_ln_2():
    for divergence in ("reverse_kl", "forward_kl", "js", "alpha"):
        loss = losses.sigmoid(some(spread=0.0), losses.Settings(divergence=divergence))
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


def test_the_same_answer_twice_has_no_gradient():
    x = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    loss = losses.sigmoid(pairs(x, x, (x.detach() + 1, x.detach() + 1)), losses.Settings())
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(loss.sum(), x)[0].item() == 0


def test_conservative_dpo_keeps_a_finite_margin():
    """Its loss is least where σ(margin) = 1 − ε; plain DPO's has no minimum."""
    m = torch.linspace(-8, 8, 3201, dtype=torch.float64)
    zero = torch.zeros_like(m)
    at = pairs(m / BETA, zero, (zero, zero))
    least = m[losses.sigmoid(at, losses.Settings(beta=BETA, smoothing=0.1)).argmin()]
    assert torch.sigmoid(least).item() == pytest.approx(0.9, abs=1e-3)
    assert m[losses.sigmoid(at, losses.Settings(beta=BETA)).argmin()] == 8


def test_alpha_divergence_between_its_limits():
    """α → 1 is the reverse KL, α = 0 the forward KL up to the sign of its constant."""
    batch = some()
    near = losses.margin(batch, losses.Settings(divergence="alpha", alpha=1 + 1e-5))
    torch.testing.assert_close(near, losses.margin(batch, losses.Settings()), rtol=1e-3, atol=1e-4)
    zero = losses.margin(batch, losses.Settings(divergence="alpha", alpha=0.0))
    torch.testing.assert_close(zero, losses.margin(batch, losses.Settings(divergence="forward_kl")))


def test_kto():
    h = torch.tensor([0.0, 3.0, -3.0, 3.0], dtype=torch.float64, requires_grad=True)
    good = torch.tensor([True, True, False, False])
    loss = losses.kto(h, good, torch.tensor(0.0), 1.0, (1.0, 2.0))
    low, high = torch.sigmoid(torch.tensor([-3.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(loss, torch.stack([low * 0 + 0.5, low, 2 * low, 2 * high]))
    signs = torch.autograd.grad(loss.sum(), h)[0].sign().tolist()
    assert signs == [-1, -1, 1, 1]
    assert losses.kto_kl(torch.tensor([-1.0, -3.0])) == 0
    assert losses.kto_kl(torch.tensor([1.0, 3.0])) == 2


def test_length_desensitized_sums():
    values, places = torch.ones(5), torch.tensor([0, 1, 2, 3, 4])
    found = losses.length_desensitized(values, places, torch.full((5,), 3), 0.25)
    assert found.tolist() == [1, 1, 1, 0.25, 0.25]
