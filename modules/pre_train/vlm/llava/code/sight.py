"""The encoder of a run, the images it sees, and what it has seen, kept: it is frozen, so each image is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.data.image_files import open_image
from finetune.errors import UserError
from finetune.lm.io import hub
from finetune.vision import load, pictures, preprocess, pretrain
from finetune.vision.preprocess import Preprocessor
from finetune.vision.pretrain import RECIPES
from finetune.vision.vit import ViT

from .data import Pixels
from .model import Llava

if TYPE_CHECKING:
    from collections.abc import Callable

    from .main import Config

KEPT = 1 << 29  # bytes of features that are kept
TEST = 400  # pictures to evaluate on


def check(encoder: str, source: str | None) -> None:
    """UserError if an encoder that is made here does not fit the built-in pictures."""
    if encoder in RECIPES and source is not None and RECIPES[encoder].images != source:
        fitting = [name for name, recipe in RECIPES.items() if recipe.images == source]
        raise UserError(
            f"--encoder {encoder} has learned {RECIPES[encoder].images}, not {source}: take {' or '.join(fitting)}"
        )


def encoder(name: str, seed: int, say: Callable[[str], None]) -> tuple[ViT, Preprocessor | None, dict[str, Any] | None]:
    """The frozen encoder of a recipe (trained now, unless it is in the cache), or that of a folder with the folder's
    preprocessing, and the settings of that as its file has them."""
    if name in RECIPES:
        total = RECIPES[name].steps

        def told(step: int, loss: float) -> None:
            if step == 0:
                say(f"training the encoder {name!r}, once for this machine and seed …")
            elif step + 1 == total:
                say(f"the encoder is trained: loss {loss:.3f} after {total} steps")

        return pretrain.pretrained(name, seed, on_step=told), None, None
    folder = hub.resolve(name)
    raw, file = preprocess.settings(folder)
    return load.vit(folder).eval().requires_grad_(False), preprocess.read_config(raw, file), raw


def splits(cfg: Config) -> dict[str, pictures.Split]:
    """The built-in pictures: to train on, and unseen ones, of the size that the encoder takes."""
    size = RECIPES[cfg.encoder].size if cfg.encoder in RECIPES else 28
    counts = {"train": cfg.count, "test": TEST}
    return pictures.load(cfg.pictures, counts, size=size, kinds=cfg.asked, seed=cfg.seed)


def of_pictures(split: pictures.Split, how: Preprocessor | None) -> Pixels:
    """The pictures of these numbers, as the encoder takes them."""
    if how is None:
        return lambda numbers: pretrain.inputs(split.x[list(numbers)])
    from PIL import Image

    return lambda numbers: how.batch([Image.fromarray(split.x[i, 0].numpy()) for i in numbers])


def of_files(how: Preprocessor | None) -> Pixels:
    """Image files as the encoder takes them."""
    if how is None:
        raise UserError("--data needs an --encoder from a folder: those that are made here know digits and emoji")
    return lambda paths: how.batch([open_image(Path(path)) for path in paths])


def probe(seen: Features, unseen: Features, split: dict[str, pictures.Split], count: int = 1000) -> float:
    """The accuracy of a linear classifier on the encoder's features, the mean of each half's patches: as well as a
    digit can be told from what the language model gets. Fitted to `count` training pictures by least squares."""

    def halves(features: Features, part: pictures.Split) -> tuple[Tensor, Tensor]:
        numbers = range(min(count, len(part)))
        found = features(numbers)  # of two strips, or a square grid
        found = found if found.shape[1] == 2 else pretrain.halves(found)
        return found.flatten(0, 1), part.digits[: len(numbers)].flatten()

    x, y = halves(seen, split["train"])
    weights = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), F.one_hot(y, 10).float(), driver="gelsd").solution
    x, y = halves(unseen, split["test"])
    return (F.pad(x, (0, 1), value=1.0) @ weights).argmax(1).eq(y).double().mean().item()


class Features:
    """features((image, …)) → (N, P, D): what the encoder of a model makes of images, each encoded once. When `KEPT`
    bytes are full, the oldest are given up."""

    def __init__(self, net: Llava, pixels: Pixels) -> None:
        self.net, self.pixels = net, pixels
        self.kept: dict[Any, Tensor] = {}
        self.bytes = 0

    @torch.no_grad()
    def __call__(self, images: Sequence[Any]) -> Tensor:
        new = [image for image in dict.fromkeys(images) if image not in self.kept]
        found = {image: self.kept[image] for image in images if image in self.kept}
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            for image, features in zip(part, self.net.encode(self.pixels(part)), strict=True):
                found[image] = self.kept[image] = features.clone()
                self.bytes += features.nbytes
        while self.bytes > KEPT and len(self.kept) > 1:
            self.bytes -= self.kept.pop(next(iter(self.kept))).nbytes
        return torch.stack([found[image] for image in images])

    def gray(self) -> Features:
        """The same for gray images in the places of all: what is answered without seeing."""

        def pixels(images: Sequence[Any]) -> Tensor:
            return torch.zeros_like(self.pixels(images))

        return Features(self.net, pixels)
