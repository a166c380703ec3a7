"""Retrieval by the first stage: images by texts and texts by images, and which of some words an image shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import Texts, match, similarities
from .model import Stage1
from .pairs import Pairs, World, tokenized

AT_ONCE = 256
# Frequent in the names of emoji, the rarest first.
WORDS = ("ball", "moon", "cat", "clock", "heart", "person", "hand", "face")


@torch.no_grad()
def vectors(model: Stage1, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Image vectors (N, Q, D) and text vectors (N, D)."""
    image = torch.cat([model.image_vectors(part) for part in pairs.features.split(AT_ONCE)])
    return image, text_vectors(model, pairs.texts)


@torch.no_grad()
def text_vectors(model: Stage1, texts: Texts) -> Tensor:
    """(N, D)."""
    places = range(0, len(texts), AT_ONCE)
    return torch.cat(
        [model.text_vectors(part.tokens, part.lengths) for i in places if (part := texts[i : i + AT_ONCE])]
    )


def recall(sim: Tensor, group: Tensor, k: int) -> float:
    """R@k: the share of the rows of sim (N, N) among whose k largest columns is one with the row's caption."""
    found = sim.topk(min(k, sim.shape[1]), 1).indices  # (N, k)
    return (group[found] == group[:, None]).any(1).double().mean().item()


@torch.no_grad()
def reranked(model: Stage1, pairs: Pairs, sim: Tensor, among: int = 16) -> Tensor:
    """sim (N, N), whose `among` best columns of each row are put into the order of ITM's logit, as the paper does."""
    found = sim.topk(min(among, len(sim)), 1).indices  # (N, k)
    out = sim - 1e4
    for i, columns in enumerate(found):
        texts = pairs.texts[columns]
        logits = model.matches(pairs.features[i].expand(len(columns), -1, -1), texts.tokens, texts.lengths)
        out[i, columns] = logits[:, 1] - logits[:, 0]
    return out


@torch.no_grad()
def match_loss(model: Stage1, pairs: Pairs, generator: torch.Generator) -> tuple[float, float]:
    """(loss, share of right answers) of ITM over the pairs and two hard negatives of each."""
    image, text = vectors(model, pairs)
    loss, accuracy = match(model, pairs.features, pairs.texts, similarities(image, text), True, generator)
    return loss.item(), accuracy.item()


def first_word(captions: Sequence[str], words: Sequence[str] = WORDS) -> list[tuple[int, int]]:
    """(row, word) of the captions that have one of the words: the first of the list. A clock face is a clock."""
    found = [(row, next((i for i, word in enumerate(words) if word in text.split()), None))
             for row, text in enumerate(captions)]  # fmt: skip
    return [(row, word) for row, word in found if word is not None]


@torch.no_grad()
def zero_shot(model: Stage1, world: World, words: Sequence[str] = WORDS) -> dict[str, float]:
    """Which word fits each held-out image best: macro (the mean of the words' shares of right answers) and micro
    accuracy; of answering the most frequent word too."""
    rows = first_word(world.test.captions, words)
    image = torch.cat([model.image_vectors(world.test.features[row : row + 1]) for row, _ in rows])
    guess = similarities(image, text_vectors(model, tokenized(world.tokenizer, words))).argmax(1)
    truth = torch.tensor([word for _, word in rows])
    right = (guess == truth).double()
    present = truth.unique()
    counts = truth.bincount(minlength=len(words)).double()
    return {
        "macro": torch.stack([right[truth == word].mean() for word in present]).mean().item(),
        "micro": right.mean().item(),
        "constant_macro": 1 / len(present),
        "constant_micro": (counts.max() / counts.sum()).item(),
        "images": float(len(rows)),
    }
