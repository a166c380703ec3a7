"""What a trained Flamingo is measured by: the word that it chooses or writes behind the last image."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.lm.tokenizer import Tokenizer

from .binding import Episodes, Pool
from .model import Flamingo

PART = 50  # sequences at once
Change = Callable[[Tensor], Tensor]  # of the features (B, M, frames, patches, C)


@torch.no_grad()
def chosen(net: Flamingo, pool: Pool, batch: Episodes, change: Change | None = None) -> Tensor:
    """(B,): which of the sequence's words is the most probable behind the last image."""
    found = []
    for part in batch.split(PART):
        features = pool.features[part.images]
        media = net.media(features if change is None else change(features))
        x = net.hidden(part.asked(net.image, net.end_of_chunk), media)[:, -1]
        found.append(net.logits(x).gather(1, part.words).argmax(1))
    return torch.cat(found)


def accuracy(net: Flamingo, pool: Pool, batch: Episodes, change: Change | None = None) -> float:
    return (chosen(net, pool, batch, change) == batch.classes[:, -1]).float().mean().item()


def others(features: Tensor) -> Tensor:
    """The images of each sequence in the place of another's."""
    return features.roll(1, 0)


def written(net: Flamingo, pool: Pool, batch: Episodes) -> float:
    """Share of the sequences to which the right word and the end of the chunk are written, freely."""
    found = []
    for part in batch.split(PART):
        media = net.media(pool.features[part.images])
        found += net.generate(part.asked(net.image, net.end_of_chunk), media, most=3)
    return sum(a == [b] for a, b in zip(found, batch.answers[:, -1].tolist(), strict=True)) / len(found)


def nearest(pool: Pool, batch: Episodes) -> float:
    """Accuracy of the class whose shown images are nearest to the query by the mean of their features: what the encoder
    allows without learning."""
    means = pool.features[batch.images].mean(3).flatten(2)  # (B, k + 1, C)
    distance = (means[:, :-1] - means[:, -1:]).square().sum(-1)
    one_hot = F.one_hot(batch.classes[:, :-1], batch.words.shape[1]).float()
    each = (distance[..., None] * one_hot).sum(1) / one_hot.sum(1)  # NaN for a class that was not shown
    return (each.nan_to_num(torch.inf).argmin(1) == batch.classes[:, -1]).float().mean().item()


@torch.no_grad()
def text_right(net: Flamingo, tokens: Tensor, known: Tensor) -> float:
    """Share of the known labels that are right in text without any image."""
    logits = torch.cat([net(part)[:, :-1] for part in tokens.split(PART)])
    return (logits.argmax(-1) == tokens[:, 1:])[known[:, 1:]].float().mean().item()


@torch.no_grad()
def told(net: Flamingo, pool: Pool, batch: Episodes, tokenizer: Tokenizer) -> list[str]:
    """What is written behind the last image of each sequence, freely."""
    media = net.media(pool.features[batch.images])
    answers = net.generate(batch.asked(net.image, net.end_of_chunk), media, most=3)
    return [tokenizer.decode(answer).strip() for answer in answers]


def shown(
    batch: Episodes, pool: Pool, tokenizer: Tokenizer, before: list[str], after: list[str]
) -> list[dict[str, str]]:
    """Rows of a table: each sequence as text, with the digit in the place of its image, and what was written behind it
    before and after training."""
    rows = []
    for i, (images, answers) in enumerate(zip(batch.images, batch.answers, strict=True)):
        names = ["".join(str(pool.labels[i].item()) for i in image) for image in images]
        words = [tokenizer.decode([answer]).strip() for answer in answers.tolist()]
        pairs = " ".join(f"[{name}] {word}" for name, word in zip(names[:-1], words[:-1], strict=True))
        row = {"sequence": f"{pairs} [{names[-1]}]", "right": words[-1]}
        rows.append(row | {"before": before[i], "after": after[i]})
    return rows
