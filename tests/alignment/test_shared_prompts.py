"""Answers behind prompts that the row holds once: the numbers and gradients of the same answers as documents."""

import pytest
import torch

from finetune import ops
from finetune.alignment import logprobs
from finetune.alignment.shared_prompts import Group, Layout, token_logprobs
from finetune.data.packing import Document, collate
from finetune.lm.llama import Llama, LlamaConfig

GROUPS = [  # of prompts and answers of several lengths; an answer of one token is not in the row at all
    Group([1, 2, 3], [[4, 5, 6], [7], [8, 9, 10, 11]]),
    Group([5, 6], [[1, 2], [3, 3, 3, 3, 3]]),
    Group([9, 8, 7], [[1, 1], [2]]),
]
SHAPES = {
    "llama": {},
    "window": {"window": 3, "window_layers": (1,)},
    "gemma": {"attention_softcap": 5.0, "logit_softcap": 8.0, "qk_norm": True},
}


def documents(groups: list[Group]) -> list[Document]:
    return [Document([*g.prompt, *a], [0] * len(g.prompt) + [1] * len(a)) for g in groups for a in g.answers]


def model(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(60, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=64, **changes)).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [GROUPS, GROUPS[:1], [Group([4, 5], [[6], [7]])]], ids=["three", "one", "short"])
def test_numbers_and_gradients_are_those_of_documents(shape: str, groups: list[Group]):
    llama = model(**SHAPES[shape])
    batch, layout = collate(documents(groups)), Layout(groups)
    assert torch.equal(layout.owners, logprobs.owners(batch))
    assert layout.tokens.shape[1] == sum(g.tokens for g in groups) < batch.tokens.shape[1]
    weights = torch.randn(len(layout.targets), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    with ops.use_backend("reference"):  # float64
        for numbers in (token_logprobs(llama, layout, 0.7), logprobs.with_entropies(llama, batch, 0.7)):
            value = (torch.stack(numbers, 1) * weights).sum()
            found.append((*numbers, *torch.autograd.grad(value, list(llama.parameters()))))
    for shared, plain in zip(*found, strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6)


def test_an_answer_sees_no_other():
    """Another answer of the group changes nothing, whatever it holds."""
    llama = model().float()
    first = token_logprobs(llama, Layout([Group([1, 2], [[3, 4, 5], [6, 7]])]))[0][:3]
    other = token_logprobs(llama, Layout([Group([1, 2], [[3, 4, 5], [9, 8]]), Group([7], [[7, 7]])]))[0][:3]
    torch.testing.assert_close(first, other, rtol=0, atol=1e-6)
