"""Prompts and prefixes: at the start as real tokens before the row, packed or padded; gradients to them alone."""

import pytest
import torch

from finetune import ops
from finetune.lm.llama import Llama, LlamaConfig
from finetune.peft.virtual_tokens import Prefix, Prompt

CONFIG = LlamaConfig(vocab_size=50, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=64)
FIRST = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Llama(CONFIG).requires_grad_(False)


def alone(model, row):
    """The logits of a row behind the real tokens."""
    return model(torch.cat([FIRST, row])[None])[0, len(FIRST) :]


@pytest.mark.parametrize("kind", [Prompt, Prefix])
def test_it_starts_as_real_tokens_before_the_row(model, kind):
    tokens = torch.arange(24).view(2, 12)
    part = kind.from_tokens(model, FIRST)
    got = part(model, tokens)
    assert got.shape == (2, 12, 50)
    for row, logits in zip(tokens, got, strict=True):
        assert torch.allclose(logits, alone(model, row), atol=1e-5)


def test_each_document_of_a_packed_row_has_its_own_prompt(model):
    tokens, bounds = torch.arange(20)[None], torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    got = Prompt.from_tokens(model, FIRST)(model, tokens, cu_seqlens=bounds)[0]
    for a, b in ((0, 7), (7, 8), (8, 20)):
        assert torch.allclose(got[a:b], alone(model, tokens[0, a:b]), atol=1e-5)


def test_padding_behind_a_prefixed_row_changes_nothing(model):
    tokens = torch.arange(24).view(2, 12)
    part = Prefix.from_tokens(model, FIRST)
    got = part(model, tokens, lengths=torch.tensor([12, 7]))
    assert torch.allclose(got[0], alone(model, tokens[0]), atol=1e-5)
    assert torch.allclose(got[1, :7], alone(model, tokens[1, :7]), atol=1e-5)


@pytest.mark.parametrize("kind", [Prompt, Prefix])
def test_gradients_reach_every_vector_and_nothing_else(model, kind):
    part = kind.from_tokens(model, FIRST)
    part(model, torch.arange(12)[None]).sin().sum().backward()
    gradient = part.vectors.grad.clone()
    assert gradient.abs().amax(1).all()
    assert all(p.grad is None for p in model.parameters())
    direction = torch.randn(part.vectors.shape, generator=torch.Generator().manual_seed(0))
    model.double()
    ends = []
    with ops.use_backend("reference"), torch.no_grad():
        for step in (1e-4, -1e-4):
            moved = kind(part.vectors.double() + step * direction)
            ends.append(moved(model, torch.arange(12)[None]).sin().sum().item())
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx((gradient * direction).sum().item(), rel=1e-3)
