"""Writes the generated parts of the READMEs.

    python scripts/readme.py [--run RUN_FOLDER …]

The table of modules comes from their module.toml. With --run, what a finished default run measured goes into its
module's README; that of sft, as the main job, without its answers into README.md and its Chinese twin too.
"""

import argparse
import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from finetune.runs import display, registry

ROOT = Path(__file__).parents[1]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"


def block(text: str, name: str, content: str) -> str:
    """`text` with `content` between <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = text.split(begin, 1)
    return f"{before}{begin}{content}{end}{rest.split(end, 1)[1]}"


def table() -> str:
    rows = ["| module | group | what you do in it |", "|---|---|---|"]
    rows += [f"| [{m.name}](modules/{m.group}/{m.name}) | {m.group} | {m.summary} |" for m in registry.modules()]
    return "\n".join(rows) + "\n"


def chinese_table() -> str:
    rows = ["| 模块 | 分组 | 内容 |", "|---|---|---|"]
    rows += [f"| [{m.title_zh}](modules/{m.group}/{m.name}) | {m.group} | {m.summary_zh} |" for m in registry.modules()]
    return "\n".join(rows) + "\n"


def measured(folder: Path, samples: bool = True) -> str:
    """What the run showed at its end, as text."""
    summary, settings = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "config"))
    judged = {
        name: {
            "error": summary["standard_error"].get(name),
            "baseline": summary["baseline"].get(name),
            "target": summary["target"].get(name),
            "higher": summary["higher_is_better"][name],
            "passed": passed,
        }
        for name, passed in summary["reached"].items()
    }
    console = Console(file=io.StringIO(), width=112)
    path = folder / "samples.json"
    for part in json.loads(path.read_text()) if samples and path.exists() else []:
        display.samples(console, part["title"], part["rows"])
    if summary["memory"]:
        display.memory(console, summary["memory"])
    display.closing(console, summary, judged, Path("RUN"))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    shown = re.sub(r"\n{2,}", "\n\n", "\n".join(lines[:-1])).strip()
    machine = settings["machine"]
    threads = settings["config"]["threads"]
    where = f"{machine['cpu']}, {threads} thread{'s'[: threads > 1]}, Python {settings['versions']['python']}"
    return f"```text\n$ python -m finetune run {summary['module']}        # {where}\n{shown}\n```\n"


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--check", action="store_true", help="change nothing; status 1 if the table is not current")
    p.add_argument("--run", nargs="+", type=Path, default=[], metavar="FOLDER", help="finished default runs to show")
    wanted = p.parse_args()
    text = block(README.read_text(), "modules", table())
    chinese = block(CHINESE.read_text(), "modules", chinese_table())
    if wanted.check:
        stale = [path.name for path, now in ((README, text), (CHINESE, chinese)) if now != path.read_text()]
        for name in stale:
            print(f"{name} is not current: python scripts/readme.py")
        return int(bool(stale))
    for folder in wanted.run:
        shown = measured(folder)
        name = json.loads((folder / "summary.json").read_text())["module"]
        page = registry.find(name).folder / "README.md"
        page.write_text(block(page.read_text(), "measured", shown))
        if name == "sft":
            text, chinese = (block(page, "run", measured(folder, samples=False)) for page in (text, chinese))
    README.write_text(text)
    CHINESE.write_text(chinese)
    return 0


if __name__ == "__main__":
    sys.exit(main())
