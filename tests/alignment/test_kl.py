"""KL estimates: values and gradients against the exact sums over an enumerated problem."""

import math

import pytest
import torch
from torch import Tensor

from finetune.alignment import kl
from finetune.alignment.gibbs import Policy, Problem
from finetune.alignment.gibbs import kl as divergence

KINDS = ("k1", "k2", "k3")


@pytest.fixture
def pair() -> tuple[Policy, Tensor]:
    """A policy some way from its reference, and the reference's log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    problem = Problem.random(generator, vocabulary=4, length=2)
    shift = torch.randn(problem.reference_logits.shape, generator=generator, dtype=torch.float64)
    return Policy(problem.sequences, problem.reference_logits + 0.7 * shift), problem.reference_logprobs


def gradient(value: Tensor, policy: Policy) -> Tensor:
    return torch.autograd.grad(value, policy.logits)[0]


def expected(terms: Tensor, policy: Policy) -> Tensor:
    """Σ_y π(y) · terms(y) where the probabilities are those of the sampler: no gradient runs through them."""
    return (policy.sequence_logprobs().detach().exp() * terms).sum()


@pytest.mark.parametrize(("kind", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_values(pair: tuple[Policy, Tensor], kind: kl.Estimator, unbiased: bool):
    policy, reference = pair
    logprobs = policy.sequence_logprobs().detach()
    exact = divergence(logprobs, reference).item()
    assert exact > 0.1
    found = expected(kl.estimate(kind, logprobs, reference), policy).item()
    assert (abs(found - exact) < 1e-12) == unbiased
    if kind != "k1":
        assert (kl.estimate(kind, logprobs, reference) >= 0).all()


def test_k3_varies_less_than_k1_near_the_reference(pair: tuple[Policy, Tensor]):
    policy, reference = pair
    near = (reference + 0.1 * (policy.sequence_logprobs().detach() - reference)).log_softmax(-1)
    spread = {k: torch.sqrt((near.exp() * kl.estimate(k, near, reference).square()).sum()) for k in KINDS}
    assert spread["k3"] < 0.3 * spread["k1"]


def test_gradients_in_the_loss(pair: tuple[Policy, Tensor]):
    """Without the ratio only k2's is that of KL(π ‖ π_ref); k1's is 0, and k3's that of the other direction."""
    policy, reference = pair
    logprobs = policy.sequence_logprobs()
    forward = gradient(divergence(logprobs, reference), policy)
    backward = gradient(divergence(reference, policy.sequence_logprobs()), policy)
    found = {
        k: gradient(expected(kl.estimate(k, policy.sequence_logprobs(), reference), policy), policy) for k in KINDS
    }
    assert found["k1"].abs().max() < 1e-12
    torch.testing.assert_close(found["k2"], forward, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["k3"], backward, rtol=1e-10, atol=1e-12)
    assert (backward - forward).norm() > 0.1 * forward.norm()


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_with_the_ratio_the_gradient_is_right(pair: tuple[Policy, Tensor], kind: kl.Estimator, off_policy: bool):
    policy, reference = pair
    old = policy.sequence_logprobs().detach()
    if off_policy:
        with torch.no_grad():
            policy.logits += torch.linspace(-0.5, 0.5, policy.logits.numel()).view_as(policy.logits)
    logprobs = policy.sequence_logprobs()
    exact = gradient(divergence(logprobs, reference), policy)
    logprobs = policy.sequence_logprobs()
    terms = kl.estimate(kind, logprobs, reference, kl.ratio_of(logprobs, old))
    torch.testing.assert_close(gradient((old.exp() * terms).sum(), policy), exact, rtol=1e-9, atol=1e-12)


def test_k1_in_the_reward_has_the_right_gradient_and_k3_has_not(pair: tuple[Policy, Tensor]):
    """The score-function gradient E[f ∇log π] of an estimate f that is a number."""
    policy, reference = pair
    exact = gradient(divergence(policy.sequence_logprobs(), reference), policy)
    found = {}
    for kind in KINDS:
        logprobs = policy.sequence_logprobs()
        number = kl.estimate(kind, logprobs, reference).detach()
        found[kind] = gradient(expected(number * logprobs, policy), policy)
    torch.testing.assert_close(found["k1"], exact, rtol=1e-10, atol=1e-12)
    for kind in ("k2", "k3"):
        assert (found[kind] - exact).norm() > 0.1 * exact.norm()


def test_equal_policies_have_no_divergence_and_no_gradient(pair: tuple[Policy, Tensor]):
    policy, _ = pair
    reference = policy.sequence_logprobs().detach()
    for kind in ("k2", "k3"):
        terms = kl.estimate(kind, policy.sequence_logprobs(), reference)
        assert terms.abs().max() == 0
        assert gradient(terms.sum(), policy).abs().max() == 0


def test_k3_of_a_token_given_up_stays_finite():
    logprobs = torch.tensor([-500.0], requires_grad=True)
    found = kl.estimate("k3", logprobs, torch.tensor([-1.0]))
    found.sum().backward()
    assert math.isfinite(found.item())
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2 and k3, not 'k4'"):
        kl.estimate("k4", torch.zeros(1), torch.zeros(1))  # type: ignore[arg-type]


def test_adaptive_coefficient():
    """Ziegler's controller: 0.1 · (1 + 0.2 · 256 / 10000) after a KL of twice the target and more."""
    controller = kl.AdaptiveCoefficient(0.1, target=6.0, horizon=10_000)
    controller.update(12.0, 256)
    assert controller.value == pytest.approx(0.100512)
    controller.update(6.0, 256)
    assert controller.value == pytest.approx(0.100512)
    controller.update(0.0, 256)
    assert controller.value == pytest.approx(0.100512 * (1 - 0.2 * 256 / 10_000))
    fixed = kl.FixedCoefficient(0.1)
    fixed.update(12.0, 256)
    assert fixed.value == 0.1


def test_adaptive_coefficient_holds_the_target():
    """A policy whose KL falls as the coefficient rises is brought to the target from either side."""
    for start in (0.001, 10.0):
        controller = kl.AdaptiveCoefficient(start, target=4.0, horizon=500)
        for _ in range(2000):
            controller.update(1 / controller.value, 16)
        assert 1 / controller.value == pytest.approx(4.0, rel=0.05)
