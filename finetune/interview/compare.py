"""`finetune compare`: what each module needs, from its module.toml, and what its last run measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.errors import UserError
from finetune.interview.brief import last_run
from finetune.runs import registry, run_folder
from finetune.runs.registry import ModuleInfo

HEADS = {
    "en": {"data": "data needed", "models": "models in memory", "memory": "peak memory", "result": "result / baseline",
           "time": "steps, time", "used": "where used", "none": "no run yet"},
    "zh": {"data": "需要的数据", "models": "需常驻显存的模型", "memory": "峰值内存", "result": "结果 / 基线",
           "time": "步数、时间", "used": "用在哪里", "none": "尚无运行"},
}  # fmt: skip

SHOWN = 2  # results of a module; its run shows the others


class Entry(NamedTuple):
    """A module with a run of it: its last one, or a given one; none: it has no run yet."""

    name: str
    info: ModuleInfo
    folder: Path | None


def entry(name: str) -> Entry:
    """Of a module's name, or of the folder of a finished run. UserError if it is neither."""
    if os.sep in name or (Path(name) / run_folder.SETTINGS).exists():
        folder = Path(name)
        if not run_folder.is_run(folder):
            raise UserError(f"{name} is neither a module (`python -m finetune list`) nor the folder of a run")
        info = registry.find(run_folder.read(folder).module)
        return Entry(f"{info.name} {folder.resolve().name}", info, folder)
    return of(registry.find(name))


def of(info: ModuleInfo) -> Entry:
    """A module with its last run."""
    try:
        return Entry(info.name, info, last_run(info))
    except UserError:
        return Entry(info.name, info, None)


def matrix(entries: Sequence[Entry], lang: str = "en") -> list[dict[str, str]]:
    """A row a module: name, data, models, memory, result, time, used."""
    rows = []
    for name, info, folder in entries:
        row = {"module": name} | {key: text[lang] for key, text in info.compare.items()}
        summary = run_folder.summary(folder) if folder else None
        if summary is None:
            row |= {"memory": HEADS[lang]["none"], "result": "–", "time": "–"}
        else:
            judged = {n: v for n, v in (summary.get("baseline") or {}).items() if v is not None}
            row["memory"] = f"{summary['peak_rss_bytes'] / 1e9:.2f} GB"
            lines = [f"{n}\n{summary['metrics'][n]:.4g} / {v:.4g}" for n, v in judged.items()]
            more = [f"+ {len(lines) - SHOWN}"] if len(lines) > SHOWN else []
            row["result"] = "\n".join(lines[:SHOWN] + more)
            row["time"] = f"{summary['steps']}, {summary['seconds']:.0f} s{' (toy)' if summary['toy'] else ''}"
        rows.append({key: row[key] for key in ("module", "data", "models", "memory", "result", "time", "used")})
    return rows
