"""Images of any resolution as tiles (LLaVA-NeXT: Liu et al. 2024, "anyres"): the image scaled to the encoder's size,
and the image cut into tiles of that size, at the best of several resolutions. Behind the encoder the tiles' patches
become one grid again, without what was padded, and each row of it ends with a vector of its own.

Transformers' LlavaNextImageProcessor gives the same bits, LlavaNextForConditionalGeneration the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from finetune.data.image_files import to_rgb
from finetune.errors import UserError
from finetune.lm.io.config import read_json, require
from finetune.runs import reading
from finetune.vision.preprocess import Preprocessor, read_config

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # height and width
GRID: tuple[Size, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MOST = 1 << 6  # tiles of an image


@dataclass(frozen=True)
class Tiler:
    """resolutions: those that an image may be scaled to, each of whole tiles; side: of a tile; base: the size of the
    whole image; each: what is done to a tile."""

    resolutions: tuple[Size, ...]
    side: int
    base: Size
    each: Preprocessor

    def __post_init__(self) -> None:
        if not self.resolutions:
            raise UserError("image_grid_pinpoints is empty: an image needs a resolution to be scaled to")
        for height, width in self.resolutions:
            if height % self.side or width % self.side or not height or not width:
                raise UserError(f"image_grid_pinpoints: {height}×{width} is not a whole number of tiles of {self.side}")
            if (count := height // self.side * (width // self.side)) > MOST:
                raise UserError(f"image_grid_pinpoints: {height}×{width} is {count} tiles, at most {MOST} are cut")

    def __call__(self, image: Image) -> Tensor:
        """(1 + tiles, 3, side, side): the whole image, then its tiles row by row."""
        from PIL import Image as pillow

        image = to_rgb(image)
        height, width = best(image.size[::-1], self.resolutions)
        inner = fitted(image.size[::-1], (height, width))
        canvas = pillow.new("RGB", (width, height))
        place = ((width - inner[1]) // 2, (height - inner[0]) // 2)
        canvas.paste(image.resize(inner[::-1], resample=self.each.resample), place)
        cuts = [
            canvas.crop((left, top, left + self.side, top + self.side))
            for top in range(0, height, self.side)
            for left in range(0, width, self.side)
        ]
        whole = image.resize(self.base[::-1], resample=self.each.resample)
        return torch.stack([self.each(part) for part in (whole, *cuts)])


def load(folder: str | Path) -> Tiler:
    """The tiling of a folder's preprocessor_config.json."""
    file = Path(folder) / "preprocessor_config.json"
    raw = read_json(file)
    kind = str(raw.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    if kind != "LlavaNextImageProcessor":
        raise UserError(f"{file}: image_processor_type = {kind!r} cuts no tiles (only LlavaNextImageProcessor)")
    require(raw, file, {"do_resize": (True, None), "do_center_crop": (True, None)})
    given = {key: value for key, value in raw.items() if key != "do_pad"}  # with empty tiles, to make a batch
    each = read_config(given | {"image_processor_type": "LlavaImageProcessor"}, file)
    grid = reading.convert({"image_grid_pinpoints": raw.get("image_grid_pinpoints") or GRID}, Grid, file)
    side = each.crop[0] if each.crop else 0
    return Tiler(tuple(grid.image_grid_pinpoints), side, each.size or (each.shortest, each.shortest), each)


class Grid(msgspec.Struct):
    """The key that names the resolutions."""

    image_grid_pinpoints: list[tuple[reading.Count, reading.Count]]


def best(size: Size, resolutions: Sequence[Size]) -> Size:
    """The resolution at which most of an image's pixels are kept, and of several the one with the least rest."""
    height, width = size

    def worth(to: Size) -> tuple[int, int]:
        scale = min(to[1] / width, to[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - to[0] * to[1]

    return max(resolutions, key=worth)  # the first of equal ones


def fitted(size: Size, into: Size) -> Size:
    """Height and width of an image scaled to fit, in its proportions."""
    wide, high = into[1] / size[1], into[0] / size[0]
    if wide < high:
        return min(math.ceil(size[0] * wide), into[0]), into[1]
    return into[0], min(math.ceil(size[1] * high), into[1])


def packed(features: Tensor, size: Size, resolutions: Sequence[Size], side: int, newline: Tensor) -> Tensor:
    """(1 + tiles, P, C) of an image of `size` (height, width) → (L, C): those of the whole image, then those of the
    tiles as one grid, row by row, without the padding, and `newline` (C,) behind each row."""
    height, width = best(size, resolutions)
    rows, columns, grid = height // side, width // side, math.isqrt(features.shape[1])
    if len(features) != 1 + rows * columns or grid * grid != features.shape[1]:
        raise UserError(f"an image of {size[1]}×{size[0]} has {1 + rows * columns} tiles of n×n patches, not "
                        f"{len(features)} of {features.shape[1]}")  # fmt: skip
    x = features[1:].view(rows, columns, grid, grid, -1).transpose(1, 2)
    x = unpadded(x.reshape(rows * grid, columns * grid, -1), size)  # (rows, columns, C)
    x = torch.cat([x, newline.to(x).expand(len(x), 1, -1)], 1)
    return torch.cat([features[0], x.flatten(0, 1)])


def unpadded(x: Tensor, size: Size) -> Tensor:
    """The grid (rows, columns, C) without the rows or columns that hold no image of these proportions."""
    rows, columns = x.shape[:2]
    if size[1] / size[0] > columns / rows:
        cut = (rows - int(round(size[0] * columns / size[1], 7))) // 2
        return x[cut : rows - cut]
    cut = (columns - int(round(size[1] * rows / size[0], 7))) // 2
    return x[:, cut : columns - cut]
