"""Losses of sampled answers: against the formulas written out, in parts, and on batches with nothing to learn."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from finetune.alignment import group_advantages
from finetune.alignment.policy_loss import NAMED, Answers, Settings, Totals, policy_loss

MOST = 9
ALL = [
    *NAMED.values(), Settings(dual_clip=3.0, two_sided=4.0), Settings(level="sequence", mean="dr_grpo"),
    Settings(kl_weight=0.1, kl_kind="k3"), Settings(kl_weight=0.1, kl_kind="k2", kl_ratio=False),
    Settings(entropy=0.01),
]  # fmt: skip


def some(lengths: list[int], seed: int = 0, apart: float = 0.3, **changes) -> Answers:
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    old = -2 * torch.rand(n, generator=g, dtype=torch.float64) - 0.1
    logprobs = (old + apart * torch.randn(n, generator=g, dtype=torch.float64)).requires_grad_()
    given = {
        "old": old,
        "owner": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        "advantages": torch.randn(len(lengths), generator=g, dtype=torch.float64),
        "entropies": torch.rand(n, generator=g, dtype=torch.float64).requires_grad_(),
        "reference": old + 0.2 * torch.randn(n, generator=g, dtype=torch.float64),
        "sampler": None,
    }
    return Answers(logprobs, **(given | changes))


def gradient(answers: Answers, totals: Totals, s: Settings) -> Tensor:
    return torch.autograd.grad(policy_loss(answers, totals, s).loss, answers.logprobs)[0]


def totals_of(answers: Answers) -> Totals:
    return Totals.of(answers.owner, len(answers.advantages), MOST)


@pytest.mark.parametrize("s", ALL)
def test_parts_of_a_batch_add_up_to_the_whole(s: Settings):
    whole = some([3, 1, 7, 2, 5])
    totals = totals_of(whole)
    wanted = policy_loss(whole, totals, s)
    grad = gradient(whole, totals, s)
    found, grads = 0.0, []
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        inside = (whole.owner >= start) & (whole.owner < stop)
        part = Answers(*(None if t is None else t[inside].detach() for t in (whole.logprobs, whole.old)),
                       whole.owner[inside] - start, whole.advantages[start:stop],
                       *(t[inside].detach() for t in (whole.entropies, whole.reference)))  # fmt: skip
        part.logprobs.requires_grad_()
        parts = policy_loss(part, totals, s)
        found += parts.loss.item()
        grads.append(torch.autograd.grad(parts.loss, part.logprobs)[0])
    assert found == pytest.approx(wanted.loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(grads), grad, rtol=1e-10, atol=1e-14)


def padded(answers: Answers, values: Tensor) -> tuple[Tensor, Tensor]:
    """(N, longest) and its mask, as other libraries have them."""
    rows = [values[answers.owner == i] for i in range(len(answers.advantages))]
    width = max(map(len, rows))
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows], dtype=values.dtype)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mean", ["grpo", "dapo", "dr_grpo"])
def test_clipped_loss_written_out(level: str, mean: str):
    answers = some([3, 1, 7, 2])
    s = Settings(mean=mean, level=level, clip_high=0.28, kl_weight=0.04)
    logprobs, mask = padded(answers, answers.logprobs)
    old, reference = (padded(answers, x)[0] for x in (answers.old, answers.reference))
    log_ratio = logprobs - old
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1))[:, None].expand_as(mask)
    ratio, a = log_ratio.exp(), answers.advantages[:, None]
    token = -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a)
    token = token + 0.04 * ratio * ((reference - logprobs).exp() - (reference - logprobs) - 1)
    wanted = {
        "grpo": ((token * mask).sum(-1) / mask.sum(-1)).mean(),
        "dapo": (token * mask).sum() / mask.sum(),
        "dr_grpo": (token * mask).sum() / (4 * MOST),
    }[mean]
    found = policy_loss(answers, totals_of(answers), s).loss
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, answers.logprobs)[0], torch.autograd.grad(wanted, answers.logprobs)[0]
    )


@pytest.mark.parametrize("s", NAMED.values(), ids=NAMED)
def test_first_step_is_the_policy_gradient(s: Settings):
    """At π = π_old nothing is clipped, and the gradient is −A ∇log π times the weight of the token."""
    answers = some([3, 1, 7, 2], apart=0.0)
    parts = policy_loss(answers, totals_of(answers), s)
    assert parts.clipped == 0
    assert parts.ratio == 13
    assert parts.approximate_kl == 0
    grad = gradient(answers, totals_of(answers), s)
    lengths = torch.tensor([3.0, 1, 7, 2])[answers.owner]
    divisor = {"grpo": lengths * 4, "dapo": torch.tensor(13.0), "dr_grpo": torch.tensor(4.0 * MOST),
               "sum": torch.tensor(4.0)}[s.mean]  # fmt: skip
    torch.testing.assert_close(grad, -answers.advantages[answers.owner] / divisor.double(), rtol=1e-9, atol=1e-12)


def test_length_bias_of_the_mean_over_an_answer():
    """Two wrong answers, of 1 and 9 tokens: under grpo they cost the same, so a token of the long one costs a ninth."""
    answers = some([1, 9], apart=0.0, advantages=torch.tensor([-1.0, -1.0], dtype=torch.float64))
    for mean, share in (("grpo", 1 / 9), ("dapo", 1.0), ("dr_grpo", 1.0)):
        grad = gradient(answers, totals_of(answers), Settings(mean=mean))
        assert (grad[1] / grad[0]).item() == pytest.approx(share)


@pytest.mark.parametrize(("advantage", "ratio", "moves"), [(1, 1.3, 0), (1, 0.7, 1), (-1, 0.7, 0), (-1, 1.3, 1)])
def test_clipping_stops_only_what_goes_further(advantage: float, ratio: float, moves: int):
    old = torch.zeros(1, dtype=torch.float64) - 1
    logprobs = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    answers = Answers(logprobs, old, torch.zeros(1, dtype=torch.int64), torch.tensor([float(advantage)]))
    parts = policy_loss(answers, Totals(1, 1, 1), Settings())
    grad = torch.autograd.grad(parts.loss, logprobs)[0]
    assert bool(grad != 0) == bool(moves)
    assert parts.clipped == 1 - moves


def test_dual_and_two_sided_clips_bound_negative_advantages():
    old = torch.full((1,), -9.0)
    logprobs = torch.full((1,), -0.1, requires_grad=True)  # a ratio of thousands
    answers = Answers(logprobs, old, torch.zeros(1, dtype=torch.int64), torch.tensor([-1.0]))
    assert policy_loss(answers, Totals(1, 1, 1), Settings()).loss > 1000
    assert policy_loss(answers, Totals(1, 1, 1), Settings(dual_clip=3.0)).loss == 3
    assert policy_loss(answers, Totals(1, 1, 1), Settings(two_sided=4.0)).loss == 4


def test_sampler_weight_is_truncated():
    old = torch.tensor([-1.0, -1.0, -1.0])
    sampler = old - torch.tensor([0.1, 5.0, -0.1])
    answers = Answers(old.clone().requires_grad_(), old, torch.arange(3), torch.ones(3), sampler=sampler)
    grad = gradient(answers, Totals(3, 3, 1), Settings())
    torch.testing.assert_close(-3 * grad, torch.tensor([0.1, 0.0, -0.1]).exp() * torch.tensor([1, 2.0, 1]))


def test_only_the_most_uncertain_tokens():
    answers = some([5, 5], entropies=torch.arange(10.0, dtype=torch.float64))
    grad = gradient(answers, totals_of(answers), Settings(entropy_share=0.2, clip_low=9, clip_high=9))
    assert (grad != 0).nonzero()[:, 0].tolist() == [8, 9]


def test_no_answers():
    answers = Answers(
        torch.zeros(0, requires_grad=True), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    )
    for s in NAMED.values():
        assert policy_loss(answers, Totals(0, 0, MOST), s).loss == 0


# --- Advantages of groups


def test_advantages_written_out():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 6.0]])
    for kind, wanted in {
        "group": (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4),
        "group_centered": r - r.mean(1, keepdim=True),
        "batch": (r - r.mean(1, keepdim=True)) / (r.std() + 1e-4),
        "leave_one_out": torch.stack(
            [torch.tensor([row[i] - row[torch.arange(4) != i].mean() for i in range(4)]) for row in r]
        ),
    }.items():
        torch.testing.assert_close(group_advantages.advantages(r, kind), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", group_advantages.KINDS)
def test_groups_without_spread_and_of_one_have_exactly_no_advantage(kind: str):
    same = torch.full((2, 7), 0.1)
    assert (group_advantages.advantages(same, kind) == 0).all()  # type: ignore[arg-type]
    assert (group_advantages.advantages(torch.tensor([[3.0], [1.0]]), kind) == 0).all()  # type: ignore[arg-type]
    assert group_advantages.spread(torch.tensor([[0.1] * 3, [0.1, 0.1, 0.2]])).tolist() == [False, True]


def test_seven_against_one():
    """The lone right answer of eight has the largest advantage of all, 2.47 with the deviation."""
    a = group_advantages.advantages(torch.tensor([[0.0] * 7 + [1.0]]))
    assert a[0, 7].item() == pytest.approx(2.474, abs=0.01)
    assert a.sum().item() == pytest.approx(0, abs=1e-5)


def test_overlong_penalty():
    lengths = torch.tensor([10.0, 80.0, 90.0, 100.0, 120.0])
    assert group_advantages.overlong_penalty(lengths, 100, 20).tolist() == [0, 0, -0.5, -1, -1]


def test_every_setting_changes_the_loss():
    """No option without effect."""
    answers = some([3, 1, 7, 2, 8, 9], apart=1.0)
    base = Settings(kl_weight=0.1, entropy=0.1, dual_clip=1.5)
    values = {policy_loss(answers, totals_of(answers), base).loss.item()}
    changes = [
        {"loss": "cispo"}, {"loss": "sapo"}, {"mean": "dapo"}, {"mean": "dr_grpo"}, {"level": "sequence"},
        {"loss": "vespo"}, {"loss": "vespo", "vespo_up": (1.0, 2.0)}, {"loss": "vespo", "vespo_down": (1.0, 2.0)},
        {"mean": "sum"},
        {"clip_low": 0.1}, {"clip_high": 0.4}, {"dual_clip": 1.2}, {"kl_weight": 0.2}, {"kl_kind": "k1"},
        {"kl_kind": "k2"}, {"kl_ratio": False}, {"entropy": 0.2}, {"entropy_share": 0.5},
        {"two_sided": 1.3, "dual_clip": 0.0},
        {"loss": "sapo", "temperature_up": 2.0}, {"loss": "sapo", "temperature_down": 2.0},
    ]  # fmt: skip
    for change in changes:
        value = policy_loss(answers, totals_of(answers), replace(base, **change)).loss.item()
        assert all(abs(value - other) > 1e-9 for other in values), change
        values.add(value)
