"""Writes the generated parts of the READMEs.

    python scripts/readme.py [--run RUN_FOLDER …]

The table of modules comes from their module.toml, those of performance from benches/results, that of the kernel ladder
from the module cuda, and that of what one can bring from the tables by which the code reads it. With --run, what a
finished default run measured goes into its module's README; that of sft, as the main job, without its answers into
README.md and README.zh-CN.md too.
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Iterable
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


def decoding(chinese: bool = False) -> str:
    """Tokens a second of ours and how much faster that is, from the reports that `bench decode_vs_llamacpp --keep`
    left."""
    texts = []
    for path in sorted((ROOT / "benches/results/decode").glob("*.json")):
        report = json.loads(path.read_text())
        about, found = report["machine"], {tuple(r["cell"].values()): r for r in report["results"]}
        heads = ["", "weights", "tokens/s", "of the bandwidth limit", "than llama.cpp", "than transformers"]
        if chinese:
            heads = ["任务", "权重", "token/秒", "带宽上限的占比", "比 llama.cpp 快", "比 transformers 快"]
        rows = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---:|"]
        for (what, form, side), ours in found.items():
            if side != "ours":
                continue
            limit = f"{ours['of_limit']:.0%}" if what.startswith("batch") else "–"
            faster = [found.get((what, form, other)) for other in ("llama.cpp", "transformers")]
            ratios = (f"{r['ratio']['median']:.2f}×" if r else "–" for r in faster)
            cells = (what, form, f"{ours['tokens_per_second']:,.0f}", limit, *ratios)
            rows.append(f"| {' | '.join(cells)} |")
        machine = f"{about['cpu']}, {about['level']}, {about['threads']} threads, {about['date']}"
        texts.append(f"{machine}:\n\n" + "\n".join(rows) + "\n")
    return "\n".join(texts)


def names(of: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in of)


def bring(chinese: bool = False) -> str:
    """What is read of models, adapters, rows, logs and environments that people have."""
    from finetune.data import conversations, rows
    from finetune.lm import chat_template
    from finetune.lm.io import gguf, gguf_types, gguf_write, hf_families, hf_rope, vocabulary
    from finetune.memory import cards, optimizers
    from finetune.peft import adapters
    from finetune.rl.envs import offline_files, spaces

    families = [family.title.partition(":")[0] for family in hf_families.FAMILIES.values()]
    kinds = "; ".join(text.partition(":")[0] for text in adapters.KINDS.values())
    sft, td = "modules/post_train/alignment/sft", "modules/post_train/rl_basics/td_learning"
    cql = "modules/post_train/offline_rl/cql"
    found = [
        ("A model folder or hub id", "模型目录或 hub id",
         f"{'; '.join([*families, 'GPT-2'])}; rope scaling {names(hf_rope.KINDS)}",
         "`run sft --model FOLDER`, `generate`, `serve`"),
        ("A GGUF file, split or not", "GGUF 文件（可分片）",
         f"{names(gguf_types.TYPES)} of the architectures {names(gguf.ARCHITECTURES)}; SentencePiece and byte-level "
         f"BPE with the pre-tokenizers {names(vocabulary.PRE_TOKENIZERS)}",
         f"the same; `export RUN --gguf T` writes {names(gguf_write.FORMATS)}"),
        ("An adapter of peft", "peft 的 adapter", kinds,
         "`generate --adapter A --compare`, `run sft --adapter A`, `merge A --out DIR`"),
        ("Chats", "对话数据", f"forms {names(conversations.FORMS)}; files {names(rows.FILES)}, each also with `.gz`",
         f"[`run sft --data FILE --dry-run`]({sft}/README.md)"),
        ("A base model, or another template", "基础模型或其他模板",
         f"the model's own template, {names(chat_template.TEMPLATES)}, or a Jinja file", "`run sft --template chatml`"),
        ("A log of steps", "离线交互日志", f"formats {names(offline_files.FORMATS)}",
         f"[`run cql --data FILE`]({cql}/README.md), with an environment or without"),
        ("An environment", "环境", f"spaces {names(spaces.SPACES)}; by id, `module:Class` or `file.py:Class`",
         f"[`run td_learning --env ID --env-arg key=value`]({td}/README.md)"),
        ("The question whether it fits", "显存是否够用",
         f"optimizers {names(optimizers.OPTIMIZERS)}; {len(cards.CARDS)} cards; LoRA, quantized weights, "
         "checkpointing, offload, ZeRO, tensor and pipeline parallelism, inference",
         '`memory config.json --for "24 GiB"`'),
    ]  # fmt: skip
    lines = ["| 你有 | 可读取 | 命令 |" if chinese else "| you have | what is read | command |", "|---|---|---|"]
    lines += [f"| {zh if chinese else en} | {what} | {command} |" for en, zh, what, command in found]
    return "\n".join(lines) + "\n"


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
    tables = {"modules": table, "bring": bring, "performance": performance, "decoding": decoding}
    for name, made in tables.items():
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
