"""The second stage: captions by a frozen language model, before whose tokens stand the image's queries, projected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune import optim
from finetune.data.toy_directory import small_llama
from finetune.errors import UserError
from finetune.lm import head
from finetune.lm.cache import KVCache
from finetune.lm.io import load
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import checkpoint
from finetune.vision import pictures

from .losses import IGNORED, prefix_loss
from .model import Stage2

AT_ONCE = 128
MOST = 12  # tokens of a written caption


@dataclass(frozen=True)
class Language:
    """A frozen language model, its tokenizer, the token with which captions end, and those between the image's vectors
    and a caption."""

    model: Llama
    tokenizer: Tokenizer
    end: int
    prompt: tuple[int, ...]

    def digest(self) -> str:
        """SHA-256 of all weights."""
        return checkpoint.fingerprint(self.model.named_parameters())

    def rows(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens, targets), each (B, T), padded on the right: the prompt, then caption and end, which are learned."""
        rows = [[*self.prompt, *self.tokenizer.encode(f" {text}"), self.end] for text in captions]
        tokens = torch.full((len(rows), max(map(len, rows))), self.end)
        targets = torch.full_like(tokens, IGNORED)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = targets[i, : len(row)] = torch.tensor(row)
        targets[:, : len(self.prompt)] = IGNORED
        return tokens, targets


def frozen(model: Llama, tokenizer: Tokenizer, prompt: Sequence[int]) -> Language:
    """The model without gradients. UserError if its captions could not end."""
    if tokenizer.eos_id is None:
        raise UserError("the language model's tokenizer names no end token, with which captions could end")
    return Language(model.eval().requires_grad_(False), tokenizer, tokenizer.eos_id, tuple(prompt))


def language(source: str, dtype: torch.dtype, prompt: str) -> Language:
    """The language model of a folder, a .gguf file, smollm2 or a hub id."""
    tokenizer = load.tokenizer(source)
    return frozen(load.llama(source, dtype), tokenizer, tokenizer.encode(prompt) if prompt else ())


def small_language(model: Llama, tokenizer: Tokenizer) -> Language:
    """The small model, which was trained on [begin] before what it repeats."""
    assert tokenizer.bos_id is not None
    return frozen(model, tokenizer, [tokenizer.bos_id])


def width(model: Llama) -> float:
    """The root mean square of the embeddings' numbers: how long a vector is that the model takes for a word."""
    return model.embeddings(torch.arange(min(4096, model.config.vocab_size))).float().square().mean().sqrt().item()


# --- A small language model of this module's own: it learns to repeat what it has read among other words


def small_model(tokenizer: Tokenizer) -> Llama:
    return small_llama(
        LlamaConfig(tokenizer.vocab_size, dim=96, layers=3, heads=4, kv_heads=4, hidden=256, max_length=64)
    )


def repetitions(
    tokenizer: Tokenizer, captions: Sequence[str], before: int, batch: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(tokens, targets), each (B, T): `before` tokens of noise in which the words of a caption stand in their order,
    then [begin] and the caption, which alone is learned: its words have to be looked up in what stands before it."""
    chosen = torch.randint(len(captions), (batch,), generator=g).tolist()
    texts = [tokenizer.encode(f" {captions[i]}")[:before] for i in chosen]
    longest = max(map(len, texts))
    tokens = torch.randint(3, tokenizer.vocab_size, (batch, before + 1 + longest + 1), generator=g)
    targets = torch.full_like(tokens, IGNORED)
    assert tokenizer.bos_id is not None
    assert tokenizer.eos_id is not None
    for i, text in enumerate(texts):
        places = torch.randperm(before, generator=g)[: len(text)].sort().values
        tokens[i, places] = torch.tensor(text)
        tokens[i, before] = tokenizer.bos_id
        rest = torch.tensor([*text, tokenizer.eos_id])
        tokens[i, before + 1 : before + 1 + len(rest)] = rest
        targets[i, before : before + len(rest)] = rest
    return tokens[:, :-1], targets[:, :-1]


def train_small(run: Any, model: Llama, tokenizer: Tokenizer, captions: Sequence[str], before: int, steps: int) -> None:
    """Trains the small language model on text alone."""
    optimizer = optim.AdamW(optim.decay_groups(model.parameters(), 0.0), lr=3e-3)
    for step in run.steps(steps, {"language": model, "optimizer": optimizer}, phase="language"):
        tokens, targets = repetitions(tokenizer, captions, before, 64, run.generator("language", step))
        learned = targets != IGNORED
        loss = head.cross_entropy(model, model(tokens, hidden=True)[learned], targets[learned])
        loss.backward()
        optimizer.step(lr=optim.cosine(step, steps, 20, 3e-3, 3e-4))
        optimizer.zero_grad()
        run.log(step, language_loss=loss)


# --- Writing


@torch.no_grad()
def write(model: Stage2, said: Language, features: Tensor, most: int = MOST) -> list[str]:
    """A caption of each image, features (N, T, image_dim): greedy, each token from those that it wrote before."""
    return [text for part in features.split(AT_ONCE) for text in continued(model(part), said, most)]


def continued(prefix: Tensor, said: Language, most: int) -> list[str]:
    """What the language model writes after vectors (B, Q, C)."""
    language, rows = said.model, len(prefix)
    prompt = language.embeddings(torch.tensor(said.prompt, dtype=torch.int64)).expand(rows, -1, -1)
    before = torch.cat([prefix.to(prompt.dtype), prompt], 1)
    cache = KVCache(language, rows, before.shape[1] + most)
    empty = torch.zeros(before.shape[:2], dtype=torch.int64)  # ids of what is embedded: not read
    state = language(empty, embedded=before, cache=cache, hidden=True)[:, -1:]
    written: list[Tensor] = []
    for i in range(most):
        token = head.logits(language, state)[:, -1].argmax(-1)
        written.append(token)
        ended = (torch.stack(written) == said.end).any(0)
        if ended.all() or i + 1 == most:
            break
        state = language(token[:, None], cache=cache, hidden=True)
    found = []
    for ids in torch.stack(written, 1).tolist():
        ids = ids[: ids.index(said.end)] if said.end in ids else ids
        found.append(said.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found


@torch.no_grad()
def caption_loss(model: Stage2, said: Language, features: Tensor, captions: Sequence[str]) -> float:
    """The mean cross entropy of the captions' tokens."""
    tokens, targets = said.rows(captions)
    parts = zip(features.split(AT_ONCE), tokens.split(AT_ONCE), targets.split(AT_ONCE), strict=True)
    found = [(prefix_loss(model, said.model, x, t, y), (y != IGNORED).sum()) for x, t, y in parts]
    return float(sum(loss * count for loss, count in found) / sum(count for _, count in found))


def digits_right(written: Sequence[str], wanted: Sequence[str]) -> tuple[float, float, float]:
    """The share of captions whose first, whose second and whose digits both are right. A digit is the first or the last
    word of a caption of three words."""
    pairs = [(one.split(), other.split()) for one, other in zip(written, wanted, strict=True)]
    right = [[len(a) == len(b) and a[i] == b[i] for i in (0, -1)] for a, b in pairs]
    left, last, both = (sum(each) / len(right) for each in (*zip(*right, strict=True), [all(row) for row in right]))
    return left, last, both


def constant(captions: Sequence[str]) -> str:
    """The digit that is the most frequent at each place: what is best without seeing the image."""
    rows = [text.split() for text in captions]
    return " ".join(max(pictures.SMALL, key=[row[i] for row in rows].count) if i != 1 else "and" for i in range(3))
