"""Log-probabilities that a model gives to answers, of documents that lie end to end without padding."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune import ops
from finetune.data.packing import IGNORE, Batch, Document, collate
from finetune.lm import head
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama
from finetune.peft import lora, whole

CHUNK = 1 << 24  # logits at once: 64 MiB in fp32


def token_logprobs(model: Llama | GPT, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log p of each learned token of a batch in order, (n,) fp32, with gradients. The logits exist only in chunks, and
    are made again in the backward pass."""
    return with_entropies(model, batch, temperature)[0]


def with_entropies(model: Llama | GPT, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies in nats of the distributions that the tokens come from), both (n,) fp32."""
    hidden = model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens, hidden=True)[0]  # (T, C)
    counted = batch.targets[0] != IGNORE
    return of_states(model, hidden[counted], batch.targets[0, counted], temperature)


def of_states(model: Llama | GPT, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probabilities of `targets` (n,), entropies) after the states `hidden` (n, C), both (n,) fp32."""
    rows = max(1, CHUNK // len(model.head_weight))
    parts = [
        checkpoint(chunk, model, some, wanted, temperature, use_reentrant=False)
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def chunk(model: Llama | GPT, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs, entropies = ops.token_logprobs(head.logits(model, hidden), targets, temperature=temperature, entropy=True)
    return logprobs, entropies


def sequence_sums(values: Tensor, batch: Batch) -> Tensor:
    """values (n,) of the learned tokens → their sums over each document, (N,)."""
    return torch.zeros(len(batch.cu_seqlens) - 1, dtype=values.dtype, device=values.device).index_add(
        0, owners(batch), values
    )


def owners(batch: Batch) -> Tensor:
    """(n,) int64: the document that each learned token belongs to."""
    places = torch.nonzero(batch.targets[0] != IGNORE)[:, 0]
    return torch.searchsorted(batch.cu_seqlens.to(places.dtype), places, right=True) - 1


def lengths(batch: Batch) -> Tensor:
    """(N,) int64: learned tokens of each document."""
    return torch.bincount(owners(batch), minlength=len(batch.cu_seqlens) - 1)


# --- The reference


class Reference:
    """The policy as it was before training, frozen. Where adapters are trained it is the same model with these switched
    off, and costs no memory: adapters that are not trained (of an earlier stage) still count. Of a model that is
    trained whole it is a copy, made here."""

    def __init__(self, model: Llama | GPT) -> None:
        self.trained = {name for name in lora.names(model) if is_trained(model, name)}
        self.policy = model
        self.model = model if self.trained else copy.deepcopy(model).requires_grad_(False)

    @contextmanager
    def standing(self) -> Iterator[Llama | GPT]:
        """Context in which the model it yields is the reference, without dropout."""
        with evaluated(self.model), without(self.model, self.trained):
            yield self.model

    @torch.no_grad()
    def token_logprobs(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Those of `token_logprobs`, without gradients and dropout."""
        with self.standing() as model:
            return token_logprobs(model, batch, temperature)

    def precomputed(self, documents: Sequence[Document], tokens: int = 2048) -> list[Tensor]:
        """The log-probabilities of each document's learned tokens, in passes of about that many tokens: computed once
        where the same documents are seen often, after which the reference may be forgotten."""
        found: list[Tensor] = []
        for part in chunks(documents, tokens):
            batch = collate(part)
            found += self.token_logprobs(batch).split(lengths(batch).tolist())
        return found


def chunks(documents: Sequence[Document], tokens: int) -> Iterator[Sequence[Document]]:
    """Neighbors that together have at most `tokens` tokens, or one that has more."""
    start, size = 0, 0
    for end, document in enumerate(documents):
        if size and size + len(document) > tokens:
            yield documents[start:end]
            start, size = end, 0
        size += len(document)
    if size:
        yield documents[start:]


def is_trained(model: nn.Module, name: str) -> bool:
    """Whether the adapter of this name has parameters that are trained."""
    parts = [layer.parts[name] for _, layer in lora.adapters(model) if name in layer.parts]
    parts += whole.kept(model).parts.get(name, {}).values()
    return any(p.requires_grad for part in parts for p in part.parameters())


@contextmanager
def without(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Context in which the adapters `names` do not count; afterwards those that did before."""
    if not names:
        yield
        return
    before = {name: 1.0 for name, modules in whole.kept(model).parts.items()
              if any(model.get_submodule(at) is module for at, module in modules.items())}  # fmt: skip
    for _, layer in lora.adapters(model):
        before |= layer.active
    lora.activate(model, {name: weight for name, weight in before.items() if name not in names})
    try:
        yield
    finally:
        lora.activate(model, before)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Context without dropout; afterwards as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
