"""The losses of pairs on a problem whose solution is known, and what each must do whatever the pairs are."""

import math

import pytest
import torch
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


def fit(problem: Problem, data: tuple[Tensor, Tensor], name: str, settings, steps: int = 80) -> Policy:
    """Minimizes the mean loss over all pairs at once."""
    policy = problem.policy()
    reference = problem.reference_logprobs
    chosen, rejected = data
    # Equal pairs are counted once, with a weight.
    kinds, counts = torch.unique(torch.stack([chosen, rejected]), dim=1, return_counts=True)
    weights = counts / counts.sum()
    optimizer = torch.optim.LBFGS(policy.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logprobs = policy.sequence_logprobs()
        batch = pairs(logprobs[kinds[0]], logprobs[kinds[1]], (reference[kinds[0]], reference[kinds[1]]))
        loss = (losses.LOSSES[name][1](batch, settings) * weights).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return policy


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dpo_ends_at_the_gibbs_distribution(seed: int):
    """20,000 pairs: KL(π ‖ π*) ≤ 0.05, and the implicit reward is the reward up to a constant."""
    g = torch.Generator().manual_seed(seed)
    problem = Problem.random(g)
    policy = fit(problem, problem.preferences(20_000, g), "sigmoid", losses.Settings(beta=BETA))
    logprobs = policy.sequence_logprobs().detach()
    best = problem.optimum(BETA)
    assert gibbs.kl(problem.reference_logprobs, best) > 0.5  # there was something to learn
    assert gibbs.kl(logprobs, best) <= 0.05
    implicit = BETA * (logprobs - problem.reference_logprobs)
    seen = problem.reference_logprobs.exp() > 1e-3  # those that the pairs tell about
    assert torch.corrcoef(torch.stack([implicit, problem.rewards])[:, seen])[0, 1] >= 0.95


def test_robust_dpo_undoes_flipped_labels():
    """A fifth of the labels flipped: plain DPO fits the flipped shares, whose margins are too small; the robust loss
    has the mean of clean labels."""
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        problem = Problem.random(g)
        data, best = problem.preferences(20_000, g, flipped=0.2), problem.optimum(BETA)
        found = {
            name: gibbs.kl(fit(problem, data, name, losses.Settings(BETA, smoothing=e)).sequence_logprobs(), best).item()
            for name, e in (("sigmoid", 0.0), ("robust", 0.2))
        }
        assert found["robust"] < 0.5 * found["sigmoid"], found


@pytest.mark.parametrize("name", losses.LOSSES)
def test_gradients_raise_chosen_over_rejected(name: str):
    """At the reference every loss moves the margin up."""
    batch = some(spread=0.0)
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
        moved = losses.Pairs(*(x + 1 for x in (batch.chosen, batch.rejected, batch.reference_chosen,
                                               batch.reference_rejected)), batch.chosen_tokens, batch.rejected_tokens)  # fmt: skip
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
