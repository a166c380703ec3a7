"""Sequences that bind words to images: k pairs of an image and a nonsense word, then an image whose word is asked for.

    <image> dax <end> <image> wug <end> <image> dax <end> … <image> → dax

Each sequence draws its classes, its words and which word belongs to which class, so no weight can hold the answer: it
is in the context or nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DIGITS = 10
# Ways to show a digit, which make new classes of it. None turns it by 180°: a 6 would be a 9.
POSES: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, lambda x: x.flip(-1), lambda x: x.rot90(1, (-2, -1)),
                                                 lambda x: x.mT)  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """Images of a split. features: (N, patches, C) of the frozen encoder; labels (N,): the digit, and 10 more for each
    pose; x: uint8 (N, 1, H, W)."""

    features: Tensor
    labels: Tensor
    x: Tensor


@dataclass(frozen=True)
class Episodes:
    """A batch of sequences, each of k pairs and a query.

    images: (B, k + 1, frames) numbers in the pool; a clip has several
    classes: (B, k + 1) which of the `ways` of its sequence an image is of, 0 … ways − 1
    words: (B, ways) the token bound to each
    """

    images: Tensor
    classes: Tensor
    words: Tensor

    def __getitem__(self, rows: slice) -> Episodes:
        return Episodes(self.images[rows], self.classes[rows], self.words[rows])

    def split(self, size: int) -> list[Episodes]:
        return [self[i : i + size] for i in range(0, len(self.words), size)]

    @property
    def answers(self) -> Tensor:
        """(B, k + 1): the word of each image; the last one is asked for."""
        return self.words.gather(1, self.classes)

    def tokens(self, image: int, end: int) -> Tensor:
        """(B, 3 (k + 1)): an image, its word and the end of the chunk, again and again."""
        answers = self.answers
        return torch.stack([torch.full_like(answers, image), answers, torch.full_like(answers, end)], 2).flatten(1)

    def asked(self, image: int, end: int) -> Tensor:
        """(B, 3 k + 1): the tokens up to the image that is asked for."""
        return self.tokens(image, end)[:, :-2]

    def known(self) -> Tensor:
        """(B, k + 1) bool: whether an image of the same class stands in front of it."""
        return (self.classes[:, :, None] == self.classes[:, None]).tril(-1).any(2)

    def relabeled(self, g: torch.Generator) -> Episodes:
        """The same images with the words of each sequence in another order, none where it was."""
        ways = self.words.shape[1]
        shift = torch.randint(1, ways, (len(self.words), 1), generator=g)
        return replace(self, words=self.words.gather(1, (torch.arange(ways) + shift) % ways))

    def unbound(self, g: torch.Generator) -> Episodes:
        """The same images, each with a word of its sequence drawn at random: nothing can be learned from it."""
        return replace(self, classes=torch.randint(self.words.shape[1], self.classes.shape, generator=g))


@dataclass(frozen=True)
class Task:
    """What is bound to words: digits, or clips of two digits of which the order is what tells them apart.

    digits: those that occur; words: (N,) tokens to draw from; frames: 1, or 2 for clips
    poses: each class of a sequence is a digit in one of this number of poses (POSES)
    """

    digits: Sequence[int]
    words: Tensor
    ways: int
    frames: int = 1
    poses: int = 1

    def choose(self, rows: int, g: torch.Generator) -> Tensor:
        """(rows, ways, frames): the labels of each class of a sequence. Clips come in pairs, ab and ba."""
        order = torch.rand(rows, len(self.digits), generator=g).argsort(1)
        drawn = torch.tensor(self.digits)[order[:, : self.ways]]  # (rows, ways), all different
        turned = torch.rand(drawn.shape, generator=g) < 0.5  # the others are upright, as all are that are asked for
        drawn = drawn + DIGITS * torch.randint(self.poses, drawn.shape, generator=g) * turned
        if self.frames == 1:
            return drawn[..., None]
        there = drawn.unflatten(1, (-1, 2))  # (rows, ways / 2, 2)
        return torch.stack([there, there.flip(2)], 2).flatten(1, 2)

    def draw(self, pool: Pool, rows: int, shots: int, g: torch.Generator) -> Episodes:
        """`rows` sequences of `shots` pairs, spread evenly over the classes in random order, and a query of a random
        class. No image occurs twice in a sequence, as long as the pool has enough."""
        ways = self.ways
        chosen = self.choose(rows, g)
        spread = torch.rand(rows, ways, generator=g).argsort(1).repeat(1, shots // ways + 1)[:, :shots]
        order = torch.rand(rows, shots, generator=g).argsort(1)
        query = torch.randint(ways, (rows, 1), generator=g)
        classes = torch.cat([spread.gather(1, order), query], 1)  # (B, k + 1)
        digits = chosen[torch.arange(rows)[:, None], classes].flatten(1)  # (B, (k + 1) · frames)
        images = torch.empty_like(digits)
        for digit in digits.unique().tolist():
            members = (pool.labels == digit).nonzero().flatten()
            shuffled = members[torch.rand(rows, len(members), generator=g).argsort(1)]  # (B, members)
            here = digits == digit
            number = here.cumsum(1) - 1  # the n-th image of this digit in the sequence
            images[here] = shuffled.gather(1, number.clamp(min=0) % len(members))[here]
        words = self.words[torch.rand(rows, len(self.words), generator=g).argsort(1)[:, :ways]]
        return Episodes(images.unflatten(1, (shots + 1, self.frames)), classes, words)
