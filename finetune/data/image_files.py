"""One image from a file of any usual format, checked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.runs import reading

if TYPE_CHECKING:
    from PIL.Image import Image


def open_image(file: Path, largest: int = 0, fix: str = "") -> Image:
    """The decoded image, upright (as its EXIF orientation says), in its own mode.

    UserError names a file that is missing, broken, animated, of more than 8 bits a channel, or of more than `largest`
    pixels a side (0: as many as Pillow decodes); `fix` is what to do about its size."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(reading.file_bytes(file))) as opened:
            if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":  # a phone's JPEG with a preview inside
                raise UserError(f"{file} is an animation of {opened.n_frames} frames: give still images")
            if largest and max(opened.size) > largest:
                raise UserError(f"{file} is {opened.width}×{opened.height}: at most {largest} a side{fix}")
            if opened.mode in ("I", "F") or opened.mode.startswith("I;"):
                raise UserError(f"{file} has pixels of more than 8 bits ({opened.mode}): save it with 8")
            opened.load()
            return ImageOps.exif_transpose(opened)
    except UserError:
        raise
    except Exception as e:  # a damaged file fails in as many ways as there are formats
        why = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise UserError(f"{file} is not a readable image ({why})") from None


def to_rgb(image: Image) -> Image:
    """The image in RGB; what is transparent is white."""
    from PIL import Image

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
