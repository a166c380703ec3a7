"""Runs the toy setting of every module, each in a process of its own, and writes a JSON report."""

import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune import checkpoint, display, machine, registry

LIMIT = 600  # seconds a module may take


def smoke(names: list[str], console: Console, reports: Path = Path("output/smoke_reports")) -> dict[str, Any]:
    """Runs the modules of these names (all if empty); `passed` if each ended well and reached its targets."""
    chosen = [registry.find(name) for name in names] or registry.modules()
    started = datetime.now()
    results = []
    for i, info in enumerate(chosen, 1):
        label = f"[{i}/{len(chosen)}] {info.name}"
        if console.is_terminal:
            with console.status(f"{label} …"):
                result = run_toy(info)
        else:
            result = run_toy(info)
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
    return {"report": str(path), **report}


def run_toy(info: registry.ModuleInfo) -> dict[str, Any]:
    """One module's result: its summary's parts, the exit code, and one line of what went wrong (or null)."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="finetune-smoke-") as folder:
        command = [sys.executable, "-m", "finetune", "run", info.name, "--toy", "--json", "--out", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            code, output, lines = done.returncode, done.stdout, done.stderr.strip().splitlines()
        except subprocess.TimeoutExpired:
            code, output, lines = 124, "", [f"stopped after {LIMIT} s"]
    summary = json.loads(output) if code == 0 else {}
    passed, error = summary.get("passed") is True, None
    if code != 0:
        error = lines[-1] if lines else f"exit code {code}"
    elif not passed:
        missed = [n for n, ok in summary["reached"].items() if ok is False]
        error = f"target missed: {', '.join(missed)}" if missed else "it judged nothing"
    kept = ("metrics", "baseline", "target", "peak_rss_bytes", "memory")
    seconds = round(time.monotonic() - began, 3)
    return {"name": info.name, "passed": passed, "exit_code": code, "error": error, "seconds": seconds} | {
        name: summary.get(name) for name in kept
    }
