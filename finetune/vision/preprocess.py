"""Images as an encoder takes them: what a checkpoint's preprocessor_config.json says, as transformers' processors of
CLIP, SigLIP, BLIP and LLaVA do it with Pillow. Both give the same bits: Pillow scales the bytes, and the arithmetic
after it has the same order and precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from finetune.data.image_files import to_rgb
from finetune.errors import UserError
from finetune.lm.io import hub
from finetune.lm.io.config import read_json, require
from finetune.runs import reading

if TYPE_CHECKING:
    from PIL.Image import Image

FAMILIES = {
    "CLIPImageProcessor": "clip", "CLIPFeatureExtractor": "clip", "SiglipImageProcessor": "siglip",
    "BlipImageProcessor": "blip", "LlavaImageProcessor": "llava",
}  # fmt: skip
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# What transformers takes for keys that a file lacks.
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    "llava": {
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    "blip": {"size": {"height": 384, "width": 384}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "siglip": {
        "size": {"height": 224, "width": 224},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}
LONGEST = 1 << 15  # pixels of a side after scaling: a larger one is a thin strip that would fill the memory

Pixels = Annotated[int, msgspec.Meta(ge=1, le=LONGEST)]
Share = reading.Positive


class Edges(msgspec.Struct, forbid_unknown_fields=True):
    """`size` or `crop_size`: the shorter side, which keeps the proportions, or both."""

    shortest_edge: Pixels | None = None
    height: Pixels | None = None
    width: Pixels | None = None


class ProcessorConfig(msgspec.Struct):
    """The keys of preprocessor_config.json on which the result depends."""

    size: Pixels | Edges
    image_mean: float | list[float]
    image_std: Share | list[Share]
    crop_size: Pixels | Edges | None = None
    do_resize: bool = True
    do_center_crop: bool = False
    do_rescale: bool = True
    do_normalize: bool = True
    do_convert_rgb: bool = True
    do_pad: bool = False  # to a square, of LLaVA's
    resample: Annotated[int, msgspec.Meta(ge=0, le=5)] = 3  # Pillow's number; 3 is bicubic
    rescale_factor: Share = 1 / 255


@dataclass(frozen=True)
class Preprocessor:
    """Scaling, cutting, rescaling and normalizing of one image, each only if it is given."""

    shortest: int = 0  # pixels of the shorter side after scaling; 0: see `size`
    size: tuple[int, int] | None = None  # height and width after scaling
    crop: tuple[int, int] | None = None  # height and width that are cut from the middle
    resample: int = 3
    factor: float | None = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    convert_rgb: bool = True
    background: tuple[int, int, int] | None = None  # the color that pads an image to a square first (LLaVA-1.5)

    def __call__(self, image: Image) -> Tensor:
        """(3, H, W) fp32 of an image, which is converted to RGB on white."""
        if self.convert_rgb:
            image = to_rgb(image)
        elif image.mode != "RGB":
            raise UserError(f"an image of mode {image.mode} where do_convert_rgb is false: convert it to RGB")
        if self.background is not None:
            image = squared(image, self.background)
        if new := self.scaled_size(image.height, image.width):
            image = image.resize(new[::-1], resample=self.resample)
        x = np.asarray(image)  # (H, W, 3) uint8
        if self.crop:
            x = centered(centered(x, self.crop[0], 0), self.crop[1], 1)
        x = x.astype(np.float32) if self.factor is None else (x.astype(np.float64) * self.factor).astype(np.float32)
        if self.mean is not None and self.std is not None:
            x = (x - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(x.transpose(2, 0, 1).copy())

    def scaled_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Height and width after scaling; None if there is no scaling."""
        if not self.shortest:
            return self.size
        short, long = sorted((height, width))
        longer = int(self.shortest * long / short)
        if longer > LONGEST:
            raise UserError(
                f"an image of {width}×{height} would be scaled to a side of {longer:,} pixels: cut it first"
            )
        return (longer, self.shortest) if width <= height else (self.shortest, longer)

    def batch(self, images: Sequence[Image]) -> Tensor:
        """(B, 3, H, W) of images. UserError if they come out in different sizes."""
        found = [self(image) for image in images]
        for i, x in enumerate(found):
            if x.shape != found[0].shape:
                a, b = ("×".join(map(str, y.shape[1:])) for y in (x, found[0]))
                raise UserError(f"image {i} comes out as {a} and image 0 as {b}: give size with height and width")
        return torch.stack(found)


def squared(image: Image, background: tuple[int, int, int]) -> Image:
    """The image in the middle of a square of its longer side."""
    from PIL import Image as pillow

    side = max(image.size)
    if side > LONGEST:
        raise UserError(f"an image of {image.width}×{image.height} would become a square of {side:,}: cut it first")
    canvas = pillow.new("RGB", (side, side), background)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def centered(x: np.ndarray, length: int, axis: int) -> np.ndarray:
    """`length` entries from the middle of an axis, with zeros around them if there are fewer."""
    there = x.shape[axis]
    if there >= length:
        start = (there - length) // 2
        return x.take(range(start, start + length), axis)
    before = math.ceil((length - there) / 2)
    ends = [(0, 0)] * x.ndim
    ends[axis] = (before, length - there - before)
    return np.pad(x, ends)


def load(path: str | Path) -> Preprocessor:
    """The preprocessing that a model folder (or hub id) describes. UserError names the key that is not supported."""
    return read_config(*settings(hub.resolve(path)))


def settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """The settings of a folder's image processor, and the file that they are in."""
    file, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if not file.exists() and whole.exists():  # newer folders hold it with the tokenizer's part
        return reading.json_file(whole, Whole).image_processor, whole
    return read_json(file), file


class Whole(msgspec.Struct):
    """The key of processor_config.json that holds the images' part."""

    image_processor: dict[str, Any]


def read_config(raw: dict[str, Any], source: object) -> Preprocessor:
    """The preprocessing of a preprocessor_config.json."""
    named = raw.get("image_processor_type") or raw.get("feature_extractor_type")
    kind = str(named).removesuffix("Fast").removesuffix("Pil")
    if kind not in FAMILIES:
        raise UserError(f"{source}: image_processor_type = {named!r} is not supported (only {', '.join(FAMILIES)})")
    family = FAMILIES[kind]
    require(raw, source, {"use_square_size": (False, None)} | ({} if family == "llava" else {"do_pad": (False, None)}))
    given = {key: value for key, value in raw.items() if value is not None}
    read = reading.convert(DEFAULTS[family] | given, ProcessorConfig, source)
    shortest, size = edges(read.size, "size", source, square=family == "blip") if read.do_resize else (0, None)
    crop = None
    if read.do_center_crop:
        if read.crop_size is None:
            raise UserError(f"{source}: do_center_crop is true, but there is no crop_size")
        crop = edges(read.crop_size, "crop_size", source, square=True)[1]
        if crop is None:
            raise UserError(f"{source}: crop_size needs height and width")
    mean = channels(read.image_mean, "image_mean", source)
    return Preprocessor(
        shortest=shortest,
        size=size,
        crop=crop,
        resample=read.resample,
        factor=read.rescale_factor if read.do_rescale else None,
        mean=mean if read.do_normalize else None,
        std=channels(read.image_std, "image_std", source) if read.do_normalize else None,
        convert_rgb=read.do_convert_rgb,
        background=tuple(int(255 * value) for value in mean) if read.do_pad else None,  # type: ignore[arg-type]
    )


def edges(size: int | Edges, key: str, source: object, square: bool) -> tuple[int, tuple[int, int] | None]:
    """(shorter side, None) or (0, (height, width)). Old files have one number: a square or the shorter side."""
    if isinstance(size, int):
        return (0, (size, size)) if square else (size, None)
    if size.shortest_edge and not (size.height or size.width):
        return size.shortest_edge, None
    if size.height and size.width and not size.shortest_edge:
        return 0, (size.height, size.width)
    raise UserError(f"{source}: {key} must have shortest_edge alone, or height and width")


def channels(value: float | list[float], key: str, source: object) -> tuple[float, ...]:
    """A number for each of the three channels."""
    found = (float(value),) * 3 if isinstance(value, (int, float)) else tuple(value)
    if len(found) != 3:
        raise UserError(f"{source}: {key} has {len(found)} numbers: it needs one, or one for each of 3 channels")
    return found
