"""Writes the generated parts of the READMEs.

    python scripts/readme.py [--run RUN_FOLDER …]

The table of modules comes from their module.toml, that of performance from benches/results, that of the kernel ladder
from the module cuda. With --run, what a finished default run measured goes into its module's README; that of sft, as
the main job, without its answers into README.md and README.zh-CN.md too.
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


# Title and all modules of each group, those that do not exist yet included.
GROUPS = {
    "pre_train/llm": ("Pretraining", "预训练", ["nanogpt", "megatron"]),
    "post_train/alignment": (
        "Fine-tuning and alignment",
        "微调与对齐",
        ["sft", "peft", "dpo", "policy_gradient", "actor_critic", "ppo", "grpo", "rlhf"],
    ),
    "post_train/rl_basics": (
        "Reinforcement learning, basics",
        "强化学习基础",
        ["mdp", "td_learning", "advantage", "gae"],
    ),
    "post_train/offline_rl": ("Offline reinforcement learning", "离线强化学习", ["cql", "bcq"]),
    "post_train/systems": ("Systems", "系统", ["cuda", "mixed_precision", "inference", "deepspeed"]),
    "pre_train/vlm": ("Vision-language models", "视觉语言模型", ["blip2", "llava", "flamingo"]),
    "pre_train/generation": ("Image generation", "图像生成", ["diffusion", "dit"]),
}


def table(chinese: bool = False) -> str:
    """The modules by group; the planned ones are named in a row of their own."""
    found = {m.name: m for m in registry.modules()}
    rows = ["| 模块 | 内容 |" if chinese else "| module | what you do in it |", "|---|---|"]
    for group, (title, title_zh, names) in GROUPS.items():
        rows.append(f"| **{title_zh if chinese else title}** | |")
        for m in (found[name] for name in names if name in found):
            assert m.group == group, f"{m.name} is in {m.group}"
            rows.append(f"| [{m.name}](modules/{group}/{m.name}) | {m.summary_zh if chinese else m.summary} |")
        if planned := ", ".join(name for name in names if name not in found):
            rows.append(f"| *{planned}* | {'计划中' if chinese else 'planned'} |")
    return "\n".join(rows) + "\n"


def ladder() -> str:
    """The matmul ladder as the module cuda counts it, with links from here."""
    module = registry.find("cuda")
    text = (module.folder / "README.md").read_text()
    rows = text.split("<!-- matmul -->\n")[1].split("<!-- /matmul -->")[0]
    return rows.replace("](code/", f"](modules/{module.group}/{module.name}/code/")


def performance(chinese: bool = False) -> str:
    """Torch's time over ours by op, from the reports that `bench --keep` left; the range over samples and passes."""
    texts = []
    for path in sorted((ROOT / "benches/results").glob("*.json")):
        report = json.loads(path.read_text())
        about = report["machine"]
        ratios: dict[str, dict[str, list[float]]] = {}
        for r in report["results"]:
            if r["cell"]["backend"] == "cpp":
                ratios.setdefault(r["cell"]["op"], {}).setdefault(r["cell"]["dtype"], []).append(r["ratio"]["median"])
        rows = [f"| {'算子' if chinese else 'op'} | fp32 | bf16 |", "|---|---:|---:|"]
        for op, found in ratios.items():
            cells = (f"{min(v):.2f} … {max(v):.2f}×" if (v := found.get(d)) else "–" for d in ("f32", "bf16"))
            rows.append(f"| {op} | {' | '.join(cells)} |")
        machine = f"{about['cpu']}, {about['level']}, torch {about['torch']}, {about['date']}"
        texts.append(f"{machine}:\n\n" + "\n".join(rows) + "\n")
    return "\n".join(texts)


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
    output = io.StringIO()
    console = Console(file=output, width=112)
    path = folder / "samples.json"
    for part in json.loads(path.read_text()) if samples and path.exists() else []:
        display.samples(console, part["title"], part["rows"])
    if summary["memory"]:
        display.memory(console, summary["memory"])
    display.closing(console, summary, judged, Path("RUN"))
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
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
    text, chinese = README.read_text(), CHINESE.read_text()
    for name, made in (("modules", table), ("performance", performance)):
        text, chinese = block(text, name, made()), block(chinese, name, made(chinese=True))
    text, chinese = (block(page, "ladder", ladder()) for page in (text, chinese))
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
