"""A finished run, for images of one's own: `python -m finetune caption RUN FILE …`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.data.image_files import open_image
from finetune.errors import UserError
from finetune.lm.io import load
from finetune.lm.tokenizer import Tokenizer
from finetune.vision.vit import ViT

from . import captions, convert, retrieval
from .captions import Language
from .losses import similarities
from .model import Stage1, Stage2
from .pairs import RECIPES, Take, encoder_of, features_of, own_image, tokenized

if TYPE_CHECKING:
    from .main import Config


@dataclass(frozen=True)
class Trained:
    """What a run made of a data set: the first stage ranks texts; the second, if it is there, writes captions."""

    encoder: ViT
    take: Take
    layer: int
    places: float
    tokenizer: Tokenizer
    first: Stage1
    second: Stage2 | None
    said: Language | None

    def images(self, files: Sequence[str]) -> list[Tensor]:
        """(3, H, W) uint8 of each file. UserError names one that cannot be read."""
        return [own_image(open_image(Path(file))) for file in files]

    def features(self, shown: Sequence[Tensor]) -> Tensor:
        return features_of(self.encoder, self.take, shown, self.layer, self.places)

    @torch.no_grad()
    def scores(self, shown: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """(images, texts): ITC's similarities."""
        image = self.first.image_vectors(self.features(shown))
        return similarities(image, retrieval.text_vectors(self.first, tokenized(self.tokenizer, texts)))

    def captions(self, shown: Sequence[Tensor]) -> list[str]:
        """What the language model writes of each image. UserError for a run without a second stage."""
        if self.second is None or self.said is None:
            raise UserError(
                "this data set has no second stage, so nothing writes captions: give --texts to choose from"
            )
        return captions.write(self.second, self.said, self.features(shown))


def opened(folder: Path, cfg: Config, name: str | None = None) -> Trained:
    """A finished run's models of the data set `name`, by default of the one that has captions. UserError names what is
    missing."""
    places = sorted(path.parent.name for path in (folder / "model").glob("*/qformer"))
    if not places:
        raise UserError(f"{folder} holds no Q-Former: is the run finished?")
    if name is not None and name not in places:
        raise UserError(f"{folder} has no data set {name!r}: it has {', '.join(places)}")
    name = name or next((each for each in places if (folder / "model" / each / "captions").is_dir()), places[0])
    place = folder / "model" / name
    recipe = RECIPES[name] if cfg.encoder == "auto" else cfg.encoder
    encoder, take = encoder_of(recipe)
    first = convert.load(Stage1, place / "qformer")
    second = said = None
    if (place / "captions").is_dir():
        second = convert.load(Stage2, place / "captions")
        if cfg.language_model == "scratch":
            said = captions.small_language(load.llama(place / "language"), load.tokenizer(place / "language"))
        else:
            said = captions.language(cfg.language_model, getattr(torch, cfg.dtype), cfg.prompt)
    return Trained(encoder, take, cfg.layer, cfg.places, load.tokenizer(place / "qformer"), first, second, said)
