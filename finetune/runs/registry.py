"""Finds the modules by their module.toml. Imports no torch: `list` must answer at once.

module.toml:
    title = { en = "Supervised fine-tuning", zh = "监督微调" }
    summary = { en = "one line", zh = "一行" }
    day = 6                                   # day of the 14-day path
    status = "ready"                          # or "draft"
    papers = ["https://arxiv.org/abs/..."]
    peers = ["trl"]                           # implementations the tests compare with
    [compare]                                 # its row in `compare`; each in en and zh
    data = { en = "…", zh = "…" }             # what it needs to learn from
    models = { en = "…", zh = "…" }           # models in memory
    used = { en = "…", zh = "…" }             # where it is used

The name of a module is its folder's, its group the two folders above: modules/<group>/<sub>/<name>/module.toml.
"""

import importlib
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from finetune.errors import UserError, nearest
from finetune.runs import reading

COMPARED = ("data", "models", "used")


class Bilingual(msgspec.Struct):
    en: str
    zh: str


class Compare(msgspec.Struct):
    data: Bilingual
    models: Bilingual
    used: Bilingual


class Day(msgspec.Struct):
    modules: list[str]


class Path14(msgspec.Struct):
    """The part of learning/path.toml that the registry reads."""

    days: list[Day]


class ModuleToml(msgspec.Struct):
    """The contents of a module.toml."""

    title: Bilingual
    summary: Bilingual
    day: Annotated[int, msgspec.Meta(ge=0, le=14)]  # 0: not on the path
    status: Literal["ready", "draft"]
    papers: list[str]
    peers: list[str]
    compare: Compare


@dataclass(frozen=True)
class ModuleInfo:
    name: str
    group: str  # e.g. "post_train/alignment"
    title: str
    title_zh: str
    summary: str
    summary_zh: str
    status: str
    day: int
    papers: list[str]
    peers: list[str]
    compare: dict[str, dict[str, str]]  # data, models, used: in en and zh
    folder: Path


def root() -> Path:
    """The folder of all modules: $FINETUNE_MODULES, or modules/ next to the package."""
    given = os.environ.get("FINETUNE_MODULES")
    return Path(given).resolve() if given else Path(__file__).resolve().parents[2] / "modules"


def modules() -> list[ModuleInfo]:
    """All modules, by day and then name. UserError names a module.toml that cannot be read."""
    found = [_read(path) for path in root().glob("*/*/*/module.toml")]
    return sorted(found, key=lambda m: (m.day, m.name))


def find(name: str) -> ModuleInfo:
    """The module of this name. UserError suggests the nearest."""
    known = {m.name: m for m in modules()}
    if name not in known:
        if day := planned_day(name):
            raise UserError(f"module '{name}' is planned (day {day} of the path) and does not exist yet")
        hint = nearest(name, known) or "; `python -m finetune list` shows all"
        raise UserError(f"unknown module '{name}'{hint}")
    return known[name]


def planned_day(name: str) -> int | None:
    """The day of learning/path.toml that names this module; None if none does."""
    path = Path(__file__).resolve().parents[2] / "learning" / "path.toml"
    days = reading.toml_file(path, Path14).days if path.exists() else []
    return next((i for i, day in enumerate(days, 1) if name in day.modules), None)


def load(info: ModuleInfo) -> types.ModuleType:
    """code/main.py as `finetune_modules.<name>.main`; its other parts are importable from it as `from .part import x`.

    The two packages above it are made here, with the code folder as their search path: no __init__.py (which would make
    `code` shadow the standard library's) and no change of sys.path.
    """
    code = (info.folder / "code").resolve()  # a link to a folder is that folder: its classes are not made twice
    if not (code / "main.py").is_file():
        raise UserError(f"module '{info.name}' has no {info.folder / 'code/main.py'}")
    parent, package = "finetune_modules", f"finetune_modules.{info.name}"
    if getattr(sys.modules.get(package), "__path__", None) != [str(code)]:
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]
        _package(parent, [])
        _package(package, [str(code)])
    try:
        return importlib.import_module(f"{package}.main")
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] in ("finetune", parent):
            raise
        raise UserError(f"module '{info.name}' needs the package '{e.name}': pip install {e.name}") from e


def part(module: str, name: str) -> types.ModuleType:
    """code/<name>.py of a module: `part("actor_critic", "sac")`."""
    load(find(module))
    return importlib.import_module(f"finetune_modules.{module}.{name}")


def _package(name: str, path: list[str]) -> None:
    if name not in sys.modules or path:
        package = types.ModuleType(name)
        package.__path__ = path
        sys.modules[name] = package


def _read(path: Path) -> ModuleInfo:
    given, folder = reading.toml_file(path, ModuleToml), path.parent
    texts = {key: getattr(given.compare, key) for key in COMPARED}
    return ModuleInfo(
        name=folder.name,
        group=f"{folder.parent.parent.name}/{folder.parent.name}",
        title=given.title.en,
        title_zh=given.title.zh,
        summary=given.summary.en,
        summary_zh=given.summary.zh,
        status=given.status,
        day=given.day,
        papers=given.papers,
        peers=given.peers,
        compare={key: {"en": text.en, "zh": text.zh} for key, text in texts.items()},
        folder=folder,
    )
