"""Small encoders trained here in seconds, since no package ships one: by classification of the digits of a picture, and
by contrast of images with their captions (CLIP's loss: Radford et al. 2021, arXiv:2103.00020, figure 3).

An encoder is made once for a recipe and a seed and kept in the user's cache. It sees the training split only, which
`finetune.vision.pictures.split_of` decides for each image, so a model above it can be measured on the others.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import optim
from finetune.diffusion import images
from finetune.errors import UserError, nearest
from finetune.lm.llama import Llama, LlamaConfig
from finetune.runs import checkpoint, wheels
from finetune.vision import load, pictures, save, vit
from finetune.vision.vit import ViT, ViTConfig, sincos_2d

CAPTION = "{} on the left and {} on the right"
UNKNOWN, END = 0, 1  # the first two ids of the captions' words
HOTTEST = math.log(100)  # CLIP's largest logarithm of 1/temperature
GRAY = 127  # of the padding
OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """What an encoder is trained on and how. Its shape is CLIP's: a class token, and a norm before the first block."""

    images: str  # "digits", "mnist": pictures of two digits; "emoji": one each
    loss: str  # "classes": the digit of each half; "captions": which caption belongs to which image
    size: int  # side of a digit or an emoji, in pixels
    patch: int
    dim: int = 64
    layers: int = 3
    heads: int = 4
    count: int = 8000  # training pictures of digits
    steps: int = 400
    batch: int = 128
    lr: float = 2e-3
    shift: int = 0  # at most so far images are moved at random, in pixels
    sines: bool = True  # positions begin as sines and cosines (`placed`), not near 0


RECIPES = {
    "digits": Recipe("digits", "classes", size=8, patch=4),
    # Two patches a digit, its upper and its lower half: few tokens for a language model, and less to confuse.
    "digits_coarse": Recipe("digits", "classes", size=8, patch=8),
    "mnist": Recipe("mnist", "classes", size=14, patch=7),
    "contrast": Recipe("emoji", "captions", size=32, patch=8, dim=128, layers=4, lr=1e-3, shift=2, sines=False),
    "contrast_digits": Recipe("digits", "captions", size=8, patch=4, sines=True),
}


def pretrained(recipe: str, seed: int = 0, *, on_step: OnStep | None = None) -> ViT:
    """The frozen encoder of a recipe: from the cache, else trained and written there. on_step hears each step's number
    and loss while it is trained.

    UserError for an unknown recipe, a machine without a color font ("contrast"), a cache that cannot be used."""
    if recipe not in RECIPES:
        raise UserError(f"there is no encoder {recipe!r}: they are {', '.join(RECIPES)}{nearest(recipe, RECIPES)}")
    from filelock import FileLock

    kept = wheels.cache_dir() / "encoders" / f"{recipe}-{seed}-{key(RECIPES[recipe], seed)}"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if not kept.is_dir():
                keep(train(RECIPES[recipe], seed, on_step), RECIPES[recipe], seed, kept)
    except OSError as error:
        raise wheels.unwritable(error) from None
    try:
        return load.vit(kept).eval().requires_grad_(False)
    except UserError as error:
        raise UserError(f"{error}; remove {kept} to have the encoder trained again") from None


def key(recipe: Recipe, seed: int) -> str:
    """Hash of all that makes the encoder: the recipe, the seed, and the text of the code."""
    found = hashlib.sha256(json.dumps([asdict(recipe), seed]).encode())
    for module in (__file__, vit.__file__, pictures.__file__):
        found.update(Path(module).read_bytes())
    return found.hexdigest()[:16]


def keep(encoder: ViT, recipe: Recipe, seed: int, folder: Path) -> None:
    """Writes the folder whole or not at all: the encoder in transformers' names, and recipe.json."""
    temporary = checkpoint.temporary_name(folder)
    try:
        save.vit(encoder, temporary)
        checkpoint.write_json(temporary / "recipe.json", asdict(recipe) | {"seed": seed})
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def train(recipe: Recipe, seed: int = 0, on_step: OnStep | None = None) -> ViT:
    """An encoder trained by the recipe. The same seed gives the same one; torch's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = captioned(recipe, seed) if recipe.loss == "captions" else None
        split = None if found else split_of(recipe, seed)
        pixels = inputs(found[0] if found else split.x)  # type: ignore[union-attr]
        encoder = placed(ViT(shape(recipe))) if recipe.sines else ViT(shape(recipe))
        rest: nn.Module = Captions(found[1], recipe.dim) if found else nn.Linear(recipe.dim, 10)
        optimizer = optim.AdamW([*encoder.parameters(), *rest.parameters()], lr=recipe.lr)
        for step in range(recipe.steps):
            rows = torch.randint(len(pixels), (recipe.batch,))
            x = shifted(pixels[rows], recipe.shift)
            if found:
                loss = contrast(encoder.compared(x), *rest(rows))
            else:
                loss = classes(encoder, rest, x, split.digits[rows])  # type: ignore[union-attr]
            loss.backward()
            optimizer.step(lr=optim.cosine(step, recipe.steps, 20, recipe.lr))
            optimizer.zero_grad()
            if on_step is not None:
                on_step(step, loss.item())
    return encoder.eval().requires_grad_(False)


def shape(recipe: Recipe) -> ViTConfig:
    """The encoder's shape: CLIP's, with a projection only where captions are compared."""
    side = recipe.size * (1 if recipe.images == "emoji" else 2)
    return ViTConfig(
        height=side,
        width=side,
        patch=recipe.patch,
        dim=recipe.dim,
        layers=recipe.layers,
        heads=recipe.heads,
        patch_bias=False,
        pre_norm=True,
        projection=recipe.dim if recipe.loss == "captions" else 0,
    )


@torch.no_grad()
def placed(encoder: ViT) -> ViT:
    """The encoder, whose learned positions begin as sines and cosines. From N(0, .02) they stay small in so few steps:
    features say what is in a patch and hardly where, and a language model that reads them confuses left and right."""
    first = int(encoder.config.class_token)
    encoder.positions[first:] = sincos_2d(encoder.config.dim, *encoder.config.grid)
    return encoder


def inputs(x: Tensor) -> Tensor:
    """uint8 images (N, 1 or 3, H, W) as the encoders take them: fp32 (N, 3, S, S) in [−1, 1], padded with gray to a
    square: what transformers' LlavaImageProcessor makes of them with do_pad and a mean and std of .5."""
    height, width = x.shape[2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = F.pad(x, (left, side - width - left, top, side - height - top), value=GRAY)
    return images.to_unit(padded).expand(-1, 3, -1, -1)


def shifted(x: Tensor, most: int) -> Tensor:
    """The images moved by the same random number of pixels up to `most`; the edge is repeated."""
    if not most:
        return x
    down, right = torch.randint(2 * most + 1, (2,)).tolist()
    padded = F.pad(x, (most,) * 4, mode="replicate")
    return padded[..., down : down + x.shape[-2], right : right + x.shape[-1]]


def split_of(recipe: Recipe, seed: int, name: str = "train") -> pictures.Split:
    """The pictures of two digits of a recipe."""
    return pictures.load(recipe.images, {name: recipe.count}, size=recipe.size, kinds=("left",), seed=seed)[name]


def halves(features: Tensor) -> Tensor:
    """(B, N, C) features of a square grid → (B, 2, C): the means of its left and its right half."""
    side = math.isqrt(features.shape[1])
    return features.unflatten(1, (side, 2, side // 2)).mean((1, 3))


def classes(encoder: ViT, head: nn.Module, x: Tensor, digits: Tensor) -> Tensor:
    """Cross-entropy of each half's digit, of the last layer and of the last but one, from which language models take
    the features. One head sees the mean of a half's patches, so a patch learns to say what is in its half."""
    before = encoder.states(x, -2)
    last = encoder.blocks[-1](before)
    first = int(encoder.config.class_token)
    found = [head(halves(encoder.norm(states)[:, first:])) for states in (before, last)]
    return torch.stack([F.cross_entropy(logits.flatten(0, 1), digits.flatten()) for logits in found]).sum()


def captioned(recipe: Recipe, seed: int, name: str = "train") -> tuple[Tensor, list[str]]:
    """uint8 images of a split and a caption of each."""
    if recipe.images == "emoji":
        found = images.emoji(recipe.size, named=True)
        places = [i for i, x in enumerate(found.x) if pictures.split_of(x.numpy().tobytes()) == name]
        return found.x[places], [found.classes[i] for i in places]
    split = split_of(recipe, seed, name)
    return split.x, [CAPTION.format(*(pictures.in_words(digit) for digit in row)) for row in split.digits.tolist()]


class Captions(nn.Module):
    """Captions and the small transformer that encodes them, causal as CLIP's: its state at the end token, projected."""

    def __init__(self, captions: list[str], dim: int) -> None:
        super().__init__()
        self.words = {word: i for i, word in enumerate(sorted({w for text in captions for w in text.split()}), 2)}
        self.longest = max(len(text.split()) for text in captions) + 1
        self.tokens, self.lengths = self.encode(captions)
        shape = LlamaConfig(len(self.words) + 2, dim, 2, 4, 4, 2 * dim, max_length=self.longest)
        self.model = Llama(shape)
        self.projection = nn.Linear(dim, dim, bias=False)
        self.hotness = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # the logarithm of 1/temperature

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (N, longest), padded with END on the right, and the number of each that are real, its END included."""
        ids = [[self.words.get(word, UNKNOWN) for word in text.split()][: self.longest - 1] for text in captions]
        tokens = torch.full((len(ids), self.longest), END)
        for i, row in enumerate(ids):
            tokens[i, : len(row)] = torch.tensor(row)
        return tokens, torch.tensor([len(row) + 1 for row in ids])

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim) of length 1 for captions of these numbers, and () the factor of the similarities."""
        return self.embed(self.tokens[rows], self.lengths[rows]), self.hotness.clamp(max=HOTTEST).exp()

    def embed(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, dim) of length 1."""
        states = self.model(tokens, lengths=lengths, hidden=True)
        return F.normalize(self.projection(states[torch.arange(len(states)), lengths - 1]), dim=-1)


def contrast(seen: Tensor, told: Tensor, factor: Tensor) -> Tensor:
    """CLIP's loss of image vectors (B, C) and caption vectors (B, C), both of length 1: the mean of the cross-entropies
    of finding the caption of each image and the image of each caption among the batch."""
    logits = factor * seen @ told.T
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
