"""Pictures with questions, made offline: two or more real handwritten digits next to each other, asked for the left or
right one, the sum, the largest, or their number.

Which split a digit image belongs to is decided by the hash of its pixels: it is the same in every run, on every
machine, and two identical images are in one split. Validation and test pictures are fixed; `seed` draws others to train
on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.diffusion import images
from finetune.diffusion.images import Images
from finetune.errors import UserError, nearest
from finetune.runs import checkpoint

SOURCES = ("digits", "mnist")
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}  # of the digit images
MOST = 6  # digits of a picture
EMPTY = -1  # a place without a digit
SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty")
# Each kind of question: what is asked, and the answer as a number, of the digits from left to right.
QUESTIONS: dict[str, tuple[str, Callable[[Sequence[int]], int]]] = {
    "left": ("Which digit is on the left?", lambda digits: digits[0]),
    "right": ("Which digit is on the right?", lambda digits: digits[-1]),
    "sum": ("What is the sum of the digits?", sum),
    "larger": ("Which digit is the largest?", max),
    "count": ("How many digits are there?", len),
}


@dataclass(frozen=True)
class Item:
    """A question about a picture."""

    picture: int  # its number in the split
    kind: str
    question: str
    answer: str  # a number in words


@dataclass(frozen=True)
class Split:
    """Pictures and their questions.

    x: uint8 (N, 1, size, places · size), white on black
    digits: int64 (N, places), −1 where a place is empty
    sources: the same shape: which of the source's images is there
    digest: SHA-256 of the digit images in their original size, the places and the questions
    """

    x: Tensor
    digits: Tensor
    sources: Tensor
    items: tuple[Item, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.x)


def in_words(number: int) -> str:
    """0 to 59 in words: "seven", "eighteen", "twenty-one"."""
    if number < 20:
        return SMALL[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{SMALL[ones]}" if ones else "")


def split_of(pixels: bytes) -> str:
    """The split that a digit image belongs to."""
    place = int.from_bytes(hashlib.sha256(pixels).digest()[:6], "big") / 2**48
    for name, share in SHARES.items():
        place -= share
        if place < 0:
            return name
    return name


def load(
    source: str = "digits",
    counts: dict[str, int] | None = None,
    *,
    least: int = 2,
    most: int = 2,
    size: int = 28,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Split]:
    """The splits of composites of `least` to `most` digits, each scaled to `size` pixels a side.

    source: "digits" (scikit-learn's, 8×8) or "mnist" (28×28); counts: pictures of each split; kinds: names of
    QUESTIONS, None for all that have more than one answer. UserError for a value that cannot be."""
    counts = {"train": 4000, "validation": 200, "test": 500} if counts is None else counts
    if source not in SOURCES:
        raise UserError(f"pictures are made of {' or '.join(SOURCES)}, not of {source!r}{nearest(source, SOURCES)}")
    if not 1 <= least <= most <= MOST:
        raise UserError(f"{least} to {most} digits: a picture has 1 to {MOST}, the least first")
    for name, count in counts.items():
        if name not in SHARES:
            raise UserError(f"there is no split {name!r}: they are {', '.join(SHARES)}")
        if count < 1:
            raise UserError(f"the split {name} needs at least 1 picture, not {count}")
    kinds = [kind for kind in QUESTIONS if kind != "count" or least < most] if kinds is None else kinds
    for kind in kinds:
        if kind not in QUESTIONS:
            raise UserError(f"there is no question {kind!r}: they are {', '.join(QUESTIONS)}{nearest(kind, QUESTIONS)}")
        if kind == "count" and least == most:
            raise UserError(f"the answer to 'count' would always be {in_words(most)}: let the number of digits vary")
    original = images.load(source)
    scaled = images.load(source, size)
    belongs = [split_of(one.numpy().tobytes()) for one in original.x]
    return {
        name: make(
            original,
            scaled,
            torch.tensor([i for i, split in enumerate(belongs) if split == name]),
            count,
            (least, most),
            kinds,
            f"{name} {seed if name == 'train' else 0}",
        )
        for name, count in counts.items()
    }


def make(
    original: Images,
    scaled: Images,
    pool: Tensor,
    count: int,
    number: tuple[int, int],
    kinds: Sequence[str],
    seed: str,
) -> Split:
    """`count` pictures of the images whose numbers are in `pool`; all digits are equally frequent, whatever the pool
    holds more of."""
    g = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6], "big"))
    least, most = number
    digits = torch.randint(10, (count, most), generator=g)
    sources = torch.empty_like(digits)
    for digit in range(10):
        of = pool[original.labels[pool] == digit]
        here = digits == digit
        sources[here] = of[torch.randint(len(of), (int(here.sum()),), generator=g)]
    wanted = torch.randint(least, most + 1, (count, 1), generator=g)
    rank = torch.rand(count, most, generator=g).argsort(1).argsort(1)
    empty = rank >= wanted  # as many places as the picture lacks digits
    tiles = scaled.x[sources].masked_fill(empty[..., None, None, None], 0)  # (N, places, 1, size, size)
    x = tiles.permute(0, 2, 3, 1, 4).flatten(3)  # (N, 1, size, places · size)
    digits, sources = digits.masked_fill(empty, EMPTY), sources.masked_fill(empty, EMPTY)
    items = tuple(
        Item(i, kind, QUESTIONS[kind][0], in_words(QUESTIONS[kind][1]([digit for digit in row if digit != EMPTY])))
        for i, row in enumerate(digits.tolist())
        for kind in kinds
    )
    return Split(x, digits, sources, items, digest(original, sources, items))


def digest(original: Images, sources: Tensor, items: Sequence[Item]) -> str:
    """SHA-256 of what is shown and asked; the pixels before they are scaled, which machines may round differently."""
    found = hashlib.sha256()
    for number in sources.unique().tolist():
        if number != EMPTY:
            found.update(original.x[number].numpy().tobytes())
    found.update(json.dumps([sources.tolist(), [asdict(item) for item in items]]).encode())
    return found.hexdigest()


def blind(train: Sequence[Item], test: Sequence[Item]) -> dict[str, float]:
    """The accuracy on `test` of answering every kind of question with its most frequent answer in `train`, by kind, and
    of all under "all": what is right without seeing the picture."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for item in train:
        answers[item.kind][item.answer] += 1
    best = {kind: min(found, key=lambda answer: (-found[answer], answer)) for kind, found in answers.items()}
    return accuracies(test, [best.get(item.kind, "") for item in test])


def accuracies(items: Sequence[Item], answers: Sequence[str]) -> dict[str, float]:
    """The share of right answers by kind, and of all under "all"; case and spaces at the ends do not count."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        right[item.kind].append(answer.strip().lower() == item.answer)
    found = {kind: sum(each) / len(each) for kind, each in right.items()}
    return found | {"all": sum(map(sum, right.values())) / len(items)} if items else {}


def write(split: Split, folder: str | Path) -> Path:
    """The split as PNG files and rows of one question each, which `finetune.data.image_rows` reads: the rows' path."""
    folder = Path(folder)
    with checkpoint.writing(folder):
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(split.x):
        images.save(folder / f"pictures/{i:05}.png", x)
    rows = [
        {
            "image": f"pictures/{item.picture:05}.png",
            "kind": item.kind,
            "messages": [
                {"role": "user", "content": f"<image>\n{item.question}"},
                {"role": "assistant", "content": item.answer},
            ],
        }
        for item in split.items
    ]
    with checkpoint.atomic_write(folder / "rows.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "rows.jsonl"
