"""Images with captions: emoji and their Unicode names, two handwritten digits and their names, or a file of rows.

The encoder is frozen, so the features of every image are computed once. Which split an image is in is decided by the
hash of its pixels (finetune/vision/pictures.py), which the encoder's training kept to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.data import image_rows
from finetune.data.image_files import to_rgb
from finetune.diffusion import images
from finetune.errors import UserError
from finetune.lm.tokenizer import Tokenizer
from finetune.vision import load, pictures, preprocess, pretrain
from finetune.vision.vit import ViT, sincos_2d

from .losses import Texts

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 16  # tokens of a caption for the Q-Former; longer ones are cut
AT_ONCE = 256  # images
RECIPES = {"emoji": "contrast", "digits": "digits"}  # of the encoders that finetune.vision.pretrain makes


@dataclass(frozen=True)
class Pairs:
    """Images of a split with one caption each. shown: uint8 images for pictures, features (N, T, C) of the encoder."""

    shown: list[Tensor]
    features: Tensor
    captions: tuple[str, ...]
    texts: Texts

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, rows: slice) -> Pairs:
        return Pairs(self.shown[rows], self.features[rows], self.captions[rows], self.texts[rows])


@dataclass(frozen=True)
class World:
    """A data set: pairs to train on and held-out ones, the encoder, which saw none of the latter, the text's tokens."""

    name: str
    train: Pairs
    test: Pairs
    gray: Tensor  # (1, T, C): features of an image that is gray everywhere
    encoder: ViT
    tokenizer: Tokenizer

    @property
    def decode(self) -> int:
        """The token with which a text to be written begins; texts hold it nowhere else."""
        assert self.tokenizer.pad_id is not None
        return self.tokenizer.pad_id


def tokenized(tokenizer: Tokenizer, captions: Sequence[str], longest: int = LONGEST) -> Texts:
    """[begin] caption [end] of each, padded on the right with what is never read."""
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    assert begin is not None
    assert end is not None
    rows = [[begin, *tokenizer.encode(f" {text}")[: longest - 2], end] for text in captions]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), end)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    numbers = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    return Texts(tokens, lengths, torch.tensor([numbers[text] for text in captions]))


def world(cfg: Any, name: str, on_step: pretrain.OnStep | None = None) -> World:
    """The data set "emoji", "digits" (`cfg.count` to train on), or "own", the rows with images of `cfg.data`.

    cfg.encoder: "auto" for the one that is made here, the name of another such recipe, or a folder of CLIP, SigLIP or
    BLIP-2. UserError names what is missing."""
    train, test = (
        emoji() if name == "emoji" else digits(cfg.count, cfg.seed) if name == "digits" else own(str(cfg.data))
    )
    if name == "own" and cfg.encoder == "auto":
        raise UserError(
            "--data needs an --encoder: a folder of CLIP, SigLIP or BLIP-2, or contrast, made here of emoji"
        )
    encoder, take = encoder_of(RECIPES[name] if cfg.encoder == "auto" else cfg.encoder, on_step)
    captions = [text for _, text in train]
    if cfg.shuffle_images:
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(cfg.seed))
        captions = [captions[i] for i in order.tolist()]
    held = [text for _, text in test]
    tokenizer = Tokenizer.train([f" {text}" for text in captions], 320 if name == "digits" else 1024)
    texts = tokenized(tokenizer, captions + held)
    parts = []
    for of, said, place in ((train, captions, slice(len(train))), (test, held, slice(len(train), None))):
        shown = [image for image, _ in of]
        parts.append(Pairs(shown, features_of(encoder, take, shown, cfg.layer, cfg.places), tuple(said), texts[place]))
    gray = features_of(encoder, take, [torch.full_like(parts[0].shown[0], 128)], cfg.layer, cfg.places)
    return World(name, parts[0], parts[1], gray, encoder, tokenizer)


Shown = list[tuple[Tensor, str]]  # images uint8 (C, H, W) with their captions
Take = Callable[[Sequence[Tensor]], Tensor]  # images to the encoder's input (N, 3, H, W)


def encoder_of(name: str, on_step: pretrain.OnStep | None = None) -> tuple[ViT, Take]:
    """A frozen encoder, and what makes its input."""
    if name not in pretrain.RECIPES:
        prepared = preprocess.load(name)
        encoder = load.vit(name).eval().requires_grad_(False)
        return encoder, lambda shown: prepared.batch([images.picture(image) for image in shown])
    encoder = pretrain.pretrained(name, on_step=on_step)
    side = encoder.config.height
    return encoder, lambda shown: torch.cat([fit(pretrain.inputs(image[None]), side) for image in shown])


def fit(x: Tensor, side: int) -> Tensor:
    """Square images (N, C, H, H) scaled to `side`, unless they have it."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)


@torch.no_grad()
def features_of(encoder: ViT, take: Take, shown: Sequence[Tensor], layer: int = -1, places: float = 0.0) -> Tensor:
    """(N, T, C): the normalized states of a layer, class token included; transformers' BLIP-2 takes the last one's.
    places: what the sines and cosines of a patch's row and column are multiplied by that are added to its state."""
    parts = [take(shown[i : i + AT_ONCE]) for i in range(0, len(shown), AT_ONCE)]
    found = torch.cat([encoder.norm(encoder.states(x, layer)) for x in parts])
    if places:
        first = int(encoder.config.class_token)
        found[:, first:] += places * sincos_2d(encoder.config.dim, *encoder.config.grid)
    return found


def emoji() -> tuple[Shown, Shown]:
    """Emoji and their names: the training split, and the validation and test splits. In the order of the pixels' hash,
    since neighbors in Unicode look alike: the first of them are a fair sample."""
    try:
        found = images.emoji(pretrain.RECIPES["contrast"].size, named=True)
    except UserError as error:
        raise UserError(f"{error}; --pictures digits needs none") from None
    order = sorted(range(len(found)), key=lambda i: hashlib.sha256(found.x[i].numpy().tobytes()).digest())
    train: Shown = []
    test: Shown = []
    for i in order:
        part = train if pictures.split_of(found.x[i].numpy().tobytes()) == "train" else test
        part.append((found.x[i], found.classes[i]))
    return train, test


def caption(digits: Sequence[int]) -> str:
    """`three and seven`."""
    return " and ".join(pictures.in_words(digit) for digit in digits)


def digits(count: int, seed: int) -> tuple[Shown, Shown]:
    """Pictures of two handwritten digits, and 500 of digits that no training picture holds."""
    size = pretrain.RECIPES["digits"].size
    found = pictures.load("digits", {"train": count, "test": 500}, size=size, kinds=("left",), seed=seed)
    train, test = (
        [(x, caption(row)) for x, row in zip(found[name].x, found[name].digits.tolist(), strict=True)]
        for name in ("train", "test")
    )
    return train, test


def own_image(image: Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.asarray(to_rgb(image)).copy()).permute(2, 0, 1)


def own(path: str) -> tuple[Shown, Shown]:
    """Images and captions of a file of rows (`finetune.data.image_rows`): the image of each, and the first answer. The
    pixels decide which are held out. UserError if a part has fewer than two rows."""
    train: Shown = []
    test: Shown = []
    for row in image_rows.read(path):
        if len(row.images) != 1:
            raise UserError(f"{row.place}: a pair has one image, the row has {len(row.images)}")
        text = next(m["content"][0]["text"] for m in row.messages if m["role"] == "assistant")
        image = own_image(row.open()[0])
        part = test if pictures.split_of(image.numpy().tobytes()) == "test" else train
        part.append((image, " ".join(text.split())))
    if min(len(train), len(test)) < 2:
        raise UserError(f"{path}: {len(train)} images to train on and {len(test)} held out: give more rows")
    return train, test
