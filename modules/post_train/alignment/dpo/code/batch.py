"""Answers in tokens, with every prompt once: what a forward pass of the module reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finetune.alignment import logprobs
from finetune.alignment.preferences import in_common
from finetune.alignment.shared_prompts import Group, Layout
from finetune.data.packing import Document
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama

PASS = 2048  # tokens of a forward pass without gradients


class Rows:
    """Groups of documents that begin alike, such as the two answers to a prompt, in one row without padding. The common
    beginning is read once (alignment/shared_prompts.py); what follows an answer's last learned token is not read.

    Per learned token, (n,), in the order of groups and their documents: targets; owners: its document, counted over all
    groups; rows: the place that predicts it. lengths (N,): learned tokens of each document."""

    def __init__(self, groups: Sequence[Sequence[Document]]) -> None:
        parts = [part for group in groups for part in split(group)]
        self.layout = Layout([Group(prompt, [ids for ids, _ in answers]) for prompt, answers in parts])
        learned = torch.tensor([bool(one) for _, answers in parts for _, mask in answers for one in mask])
        self.targets, self.owners = self.layout.targets[learned], self.layout.owners[learned]
        self.rows = self.layout.rows[learned]
        self.lengths = torch.bincount(self.owners, minlength=sum(map(len, groups)))

    @property
    def tokens(self) -> int:
        return self.layout.tokens.numel()

    def states(self, model: Llama | GPT) -> Tensor:
        """(n, C): what the learned tokens are predicted from."""
        layout = self.layout
        return model(layout.tokens, positions=layout.positions, cache=layout, hidden=True)[0, self.rows]

    def logprobs(self, model: Llama | GPT) -> Tensor:
        """(n,) fp32: log p of the learned tokens, with gradients."""
        return logprobs.of_states(model, self.states(model), self.targets)[0]

    def sums(self, values: Tensor) -> Tensor:
        """(n,) → (N,): over the tokens of each document."""
        return torch.zeros(len(self.lengths), dtype=values.dtype).index_add(0, self.owners, values)


Part = tuple[list[int], list[tuple[list[int], list[int]]]]  # a beginning; (tokens, mask) of what follows it


def split(group: Sequence[Document]) -> Iterator[Part]:
    """A group as its common beginning, of which nothing is learned, and the answers; documents that begin differently
    one by one."""
    first = [list(document.mask).index(1, 1) for document in group]  # the first token of all is predicted by nothing
    common = min([*first, *(in_common(group[0].ids, other.ids) for other in group[1:])])
    if not common:
        for document in group:
            yield from split([document])
        return
    answers = []
    for document in group:
        end = len(document) - list(document.mask)[::-1].index(1)
        answers.append((list(document.ids[common:end]), list(document.mask[common:end])))
    yield list(group[0].ids[:common]), answers


@torch.no_grad()
def answer_logprobs(model: Llama, groups: Sequence[Sequence[Document]]) -> list[Tensor]:
    """log p of each document's learned tokens, without dropout, in passes of about PASS tokens."""
    found: list[Tensor] = []
    with logprobs.evaluated(model):
        for part in chunks(groups):
            rows = Rows(part)
            found += rows.logprobs(model).split(rows.lengths.tolist())
    return found


def chunks(groups: Sequence[Sequence[Document]]) -> Iterator[Sequence[Sequence[Document]]]:
    """Neighbors that together have at most PASS tokens, or one that has more."""
    start, size = 0, 0
    for end, group in enumerate(groups):
        count = sum(map(len, group))
        if size and size + count > PASS:
            yield groups[start:end]
            start, size = end, 0
        size += count
    if size:
        yield groups[start:]
