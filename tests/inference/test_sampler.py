"""The sampler: its masks are transformers', its draws the distribution's, and each depends on its own request only."""

import math

import pytest
import torch

from finetune.errors import UserError
from finetune.inference import sampler
from finetune.inference.sampler import (
    FEW,
    Sampling,
    draw,
    drawn,
    outside,
    penalized,
    probabilities,
    truncated,
    uniform,
)  # fmt: skip

SETTINGS = (
    {"top_k": 5}, {"top_k": 1}, {"top_k": 1000}, {"top_p": 0.3}, {"top_p": 0.95}, {"top_p": 1e-9}, {"min_p": 0.2},
    {"min_p": 1.0}, {"typical_p": 0.2}, {"typical_p": 0.9}, {"top_k": 8, "top_p": 0.7, "min_p": 0.1, "typical_p": 0.8},
)  # fmt: skip


def rows(count=20, vocabulary=50, size=3.0):
    return size * torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.peer
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_masks_are_those_of_transformers(settings, temperature):
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper,
             "typical_p": TypicalLogitsWarper}  # fmt: skip
    logits = rows()
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    for name, kind in kinds.items():
        if name in settings:
            theirs = kind(settings[name])(None, theirs)
    how = Sampling(temperature=temperature, **settings)
    for row, wanted in zip(logits, theirs, strict=True):
        torch.testing.assert_close(truncated(row, how), wanted, rtol=1e-6, atol=0)


@pytest.mark.peer
def test_the_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, answer = [3, 3, 7], [9, 1]
    for row in rows():
        wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + answer]), row[None].clone())[0]
        before = row.clone()
        torch.testing.assert_close(penalized(row, Sampling(repetition_penalty=1.7), prompt, answer), wanted)
        assert torch.equal(row, before)


def test_presence_frequency_and_bias_by_hand():
    how = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={0: 1.0, 2: -100.0})
    found = penalized(torch.zeros(5), how, prompt=[4], answer=[1, 2, 1])
    assert found.tolist() == [1.0, -1.0, -100.75, 0.0, 0.0]


def test_draws_follow_the_distribution():
    """Pearson's chi-square of 20,000 draws at one position each; its 99.99 % point for 9 degrees of freedom is 33.7."""
    p = probabilities(rows(1, 10, 1.0)[0], Sampling(temperature=1.0))
    count = 20_000
    found = torch.bincount(torch.tensor([draw(p, uniform(7, i)) for i in range(count)]), minlength=10)
    assert float(((found - count * p) ** 2 / (count * p)).sum()) < 33.7


def test_a_uniform_number_is_a_function_of_seed_position_and_stream():
    assert uniform(1, 2) == uniform(1, 2)
    found = {uniform(seed, at, stream) for seed in (0, 1, 2**63 - 1) for at in range(50) for stream in range(3)}
    assert len(found) == 3 * 50 * 3
    assert all(0 <= u < 1 for u in found)


def test_draw_at_the_ends():
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0], dtype=torch.float64)
    assert [draw(p, u) for u in (0.0, 0.2499, 0.25, math.nextafter(1, 0))] == [1, 1, 3, 3]


def test_greedy_is_the_most_likely_token_after_penalties():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert probabilities(logits, Sampling()).tolist() == [0, 1, 0]
    assert probabilities(logits, Sampling(frequency_penalty=1.5), answer=[1]).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": 1e-9}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
        {"top_p": 0}, {"top_p": math.nan}, {"min_p": 1.1}, {"typical_p": 0}, {"repetition_penalty": 0},
        {"presence_penalty": 3}, {"frequency_penalty": math.nan}, {"logit_bias": {1: math.inf}}, {"seed": -1},
        {"seed": 2**63}, {"logprobs": -1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("settings", [{}, {"top_k": 7}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.5}], ids=str)
def test_rows_that_are_drawn_together_get_the_tokens_they_get_alone(settings):
    """Some logits are tied, some −inf; the bits of a row do not depend on the others."""
    logits = rows(40, 300)
    logits[:, 5:9], logits[::3, 20:200] = 2.0, -math.inf
    how = Sampling(temperature=0.7, seed=5, **settings)
    assert how.simple
    alone = [draw(probabilities(row, how), uniform(5, i)) for i, row in enumerate(logits)]
    assert drawn(logits, how.simple, [(5, i) for i in range(40)])[0] == alone
    assert drawn(logits[:1], how.simple, [(5, 0)])[0] == alone[:1]
    assert len(set(alone)) > 10


def test_what_is_not_drawn_together():
    for other in ({"min_p": 0.1}, {"logprobs": 0}, {"repetition_penalty": 1.1}, {"logit_bias": {3: 1.0}}):
        assert Sampling(temperature=1.0, **other).simple is None
    assert Sampling(top_k=3).simple is None


@pytest.mark.parametrize("size", [1, 7, FEW, 5000])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 8.0], ids=lambda s: f"spread {s}")
def test_top_p_of_a_large_vocabulary_is_that_of_sorting_it(size, spread, monkeypatch):
    """Flat and steep, with ties, with tokens that are out already, with sums that meet top_p exactly."""
    g = torch.Generator().manual_seed(size)
    rows = torch.randn(6, size, generator=g) * spread
    rows[1] = rows[1].round()
    rows[2, : size // 2] = -torch.inf
    rows[3] = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().repeat(size // 4 + 1)[:size]
    for top_p in (0.25, 0.5, 0.9, 0.95, 0.999, 1e-9):
        found = [outside(row[None], top_p)[0] for row in rows]
        with monkeypatch.context() as patched:
            patched.setattr(sampler, "DOUBT", math.inf)  # sorts everything
            assert all(torch.equal(one, outside(row[None], top_p)[0]) for one, row in zip(found, rows, strict=True))


def test_top_p_seldom_sorts_a_large_vocabulary(monkeypatch):
    rows, sorts, sort = torch.randn(50, 20_000, generator=torch.Generator().manual_seed(0)) * 4, [], torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, *how: sorts.append(1) or sort(self, *how))
    for row in rows:
        assert not outside(row[None], 0.9)[0, row.argmax()]
    assert len(sorts) <= 5
