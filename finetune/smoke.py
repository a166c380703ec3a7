"""Smoke test: every module's --help and toy run, each in its own process; a report as JSON and Markdown."""

import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.errors import UserError
from finetune.runs import checkpoint, config, display, machine, registry

LIMIT = 600  # seconds a command may take
KEPT = (  # of a summary
    "metrics", "standard_error", "baseline", "target", "reached", "higher_is_better", "peak_rss_bytes", "memory",
)  # fmt: skip


def smoke(names: list[str], console: Console, reports: Path = Path("output/smoke_reports")) -> dict[str, Any]:
    """Runs the modules of these names (all if empty); `passed` if each ended well and reached its targets."""
    chosen = [registry.find(name) for name in names] or registry.modules()
    started = datetime.now()
    results = []
    for i, info in enumerate(chosen, 1):
        label = f"[{i}/{len(chosen)}] {info.name}"
        if console.is_terminal:
            with console.status(f"{label} …"):
                result = check(info)
        else:
            result = check(info)
        results.append(result)
        verdict = "passed" if result["passed"] else f"FAILED: {result['error']}"
        console.print(f"{label}: {verdict} in {display.duration(result['seconds'])}", markup=False, highlight=False)
    report = {
        "started": started.astimezone().isoformat(timespec="seconds"),
        "passed": all(r["passed"] for r in results),
        "modules": results,
        "versions": machine.versions(),
        "machine": machine.describe(),
        "git": machine.git_revision(),
    }
    with checkpoint.writing(reports):
        reports.mkdir(parents=True, exist_ok=True)
    path = reports / f"{started:%Y%m%d-%H%M%S}.json"
    checkpoint.write_json(path, report)
    page = path.with_suffix(".md")
    with checkpoint.atomic_write(page) as temporary:
        temporary.write_text(as_markdown(report), encoding="utf-8")
    return {"report": str(page), **report}


def check(info: registry.ModuleInfo) -> dict[str, Any]:
    """One module's result: its summary's parts, the exit code, and one line of what went wrong (or null)."""
    began = time.monotonic()
    result = run_help(info) or run_toy(info)
    return {"name": info.name, **result, "seconds": round(time.monotonic() - began, 3)}


def run_help(info: registry.ModuleInfo) -> dict[str, Any] | None:
    """None if `run NAME --help` names every setting, else the result."""
    code, output, lines = call("run", info.name, "--help")
    if code:
        error = lines[-1] if lines else f"exit code {code}"
    else:
        settings = [config.dashed(field.name) for field in config.describe(registry.load(info).Config)]
        missing = [name for name in settings if f"--{name}" not in output]
        if not missing:
            return None
        error = f"does not name {', '.join(missing)}"
    return {"passed": False, "exit_code": code, "error": f"--help: {error}", **dict.fromkeys(KEPT)}


def run_toy(info: registry.ModuleInfo) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="finetune-smoke-") as folder:
        code, output, lines = call("run", info.name, "--toy", "--json", "--out", folder)
        broken = "" if code else brief_error(info, Path(folder))
    summary = json.loads(output) if code == 0 else {}
    passed, error = summary.get("passed") is True, None
    if code != 0:
        error = lines[-1] if lines else f"exit code {code}"
    elif not passed:
        missed = [n for n, ok in summary["reached"].items() if ok is False]
        error = f"target missed: {', '.join(missed)}" if missed else "it judged nothing"
    elif broken:
        passed, error = False, f"brief: {broken}"
    return {"passed": passed, "exit_code": code, "error": error} | {name: summary.get(name) for name in KEPT}


def brief_error(info: registry.ModuleInfo, folder: Path) -> str:
    """Why the module's brief cannot be made from this run; empty if it can, or if there is none."""
    from finetune.interview import brief

    try:
        for lang in ("en", "zh") if (info.folder / "interview.toml").exists() else ():
            brief.brief(info, lang, folder)
    except UserError as e:
        return str(e)
    return ""


def call(*words: str) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr of `python -m finetune …`."""
    command = [sys.executable, "-m", "finetune", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return 124, "", [f"stopped after {LIMIT} s"]
    return done.returncode, done.stdout, done.stderr.strip().splitlines()


def as_markdown(report: dict[str, Any]) -> str:
    """The report for a person: a table of the modules, then every result with its baseline and target."""
    modules, machine_, git = report["modules"], report["machine"], report["git"]
    good = sum(m["passed"] for m in modules)
    lines = [
        f"# Smoke test: {good} of {len(modules)} modules passed",
        "",
        f"{report['started']} · {machine_['cpu']}, {machine_['physical_cores']} cores · Python "
        f"{report['versions']['python']}, torch {report['versions']['torch']}"
        + (f" · {git['revision'][:12]}{', changed' if git['dirty'] else ''}" if git else ""),
        "",
        "Of each module: `run NAME --help` names every setting, and `run NAME --toy` reaches its targets.",
        "",
        "| module | result | time | peak memory |",
        "|---|---|---:|---:|",
    ]
    for m in modules:
        verdict = "passed" if m["passed"] else f"**FAILED** {m['error']}"
        lines.append(
            f"| {m['name']} | {verdict} | {display.duration(m['seconds'])} | {display.size(m['peak_rss_bytes'])} |"
        )
    judged = ["", "| module | result | value | baseline | target | |", "|---|---|---:|---:|---:|---|"]
    for m in modules:
        for name, reached in (m["reached"] or {}).items():
            sign = "≥" if m["higher_is_better"][name] else "≤"
            target = m["target"].get(name)
            mark = {True: "reached", False: "**missed**", None: "–"}[reached]
            value = display.uncertain(m["metrics"][name], (m["standard_error"] or {}).get(name))
            bar = "–" if target is None else f"{sign} {display.number(target)}"
            baseline = display.number(m["baseline"].get(name))
            judged.append(f"| {m['name']} | {name} | {value} | {baseline} | {bar} | {mark} |")
    return "\n".join([*lines, *(judged if len(judged) > 3 else [])]) + "\n"
