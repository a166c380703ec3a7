"""Copies pictures of a finished run into its module's README folder: pictures/<name>.png, at most 150 kB each.

python scripts/pictures.py RUN_FOLDER NAME.png [NAME.png …]
"""

import argparse
import io
import json
from pathlib import Path

from PIL import Image

from finetune.runs import registry

MOST_BYTES, WIDTH = 150_000, 1400


def shrunk(path: Path) -> bytes:
    """The picture in a palette of 256 colors, as wide as it fits into MOST_BYTES. MAXCOVERAGE keeps thin lines."""
    picture, width = Image.open(path).convert("RGB"), WIDTH
    while True:
        small = picture.copy()
        small.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        palette = small.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(file, "PNG", optimize=True)
        if file.tell() <= MOST_BYTES:
            return file.getvalue()
        width = width * 9 // 10


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("run", type=Path, metavar="RUN_FOLDER")
    p.add_argument("names", nargs="+", metavar="NAME.png")
    wanted = p.parse_args()
    module = json.loads((wanted.run / "summary.json").read_text())["module"]
    folder = registry.find(module).folder / "pictures"
    folder.mkdir(exist_ok=True)
    for name in wanted.names:
        (folder / name).write_bytes(made := shrunk(wanted.run / name))
        print(f"{folder / name}: {len(made) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
