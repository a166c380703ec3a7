"""Where models come from: local folders, GGUF files, the Hugging Face hub, and SmolLM2 from the package index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.lm.io import smollm2
from finetune.runs import reading, run_folder

if TYPE_CHECKING:
    from rich.console import Console


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
        return smollm2.fetch(console)
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
