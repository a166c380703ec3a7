"""learning/CHEAT_SHEET.md in both languages: the formulas of finetune/memory with their derivations, the comparison
matrix and each module's own formula. Everything on it is read from where it is defined.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from finetune.interview.compare import HEADS
from finetune.interview.content import LANGUAGES
from finetune.memory import cli
from finetune.memory.formulas import MEANING
from finetune.memory.setup import Setup, shape_of
from finetune.memory.sheet import ENTRIES
from finetune.runs import registry

MODEL, TOKENS = "llama-7b", Setup(batch=1, seq=2048)
SHAPE = shape_of(cli.MODELS[MODEL])
TERMS = {
    "weights": "权重",
    "gradients": "梯度",
    "optimizer states": "优化器状态",
    "activations": "激活值",
    "activations of a block": "一个 block 的激活值",
    "logits": "logits",
    "KV cache": "KV cache",
    "gathered parameters": "聚集（all-gather）的参数",
    "reference model": "参考模型",
    "reward model": "奖励模型",
    "value model": "价值模型",
}
WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "title": "Cheat sheet",
        "made": "Made by `python scripts/learning.py` from `finetune/memory/sheet.py` and each module's `module.toml` "
        "and README.",
        "memory": "Memory of one rank",
        "measure": "Measured on models of the shape that a module trains (ZeRO is simulated, gathered parameters are "
        "not measured) by",
        "heads": ("setting", "what", "bytes", f"{MODEL}, {TOKENS.batch} × {TOKENS.seq} tokens"),
        "sum": "together",
        "host": " (in the host's memory)",
        "letters": "Letters",
        "why": "Where they come from",
        "peak": "**The peak of a step** is weights, optimizer states and other models, plus the largest of four "
        "moments: in the loss (activations and logits); in the last block's backward pass (activations and what "
        "passes "
        "through); in the first block's (its activations and nearly all gradients); at the end (all gradients, a tied "
        "table's twice).",
        "matrix": "The methods side by side",
        "numbers": "With the numbers of your own runs:",
        "module": "module",
        "formulas": "Each module's formula",
    },
    "zh": {
        "title": "速查表",
        "made": "由 `python scripts/learning.py` 根据 `finetune/memory/sheet.py`、各模块的 `module.toml` 与 README "
        "生成。",
        "memory": "单个 rank 的显存",
        "measure": "在与模块同形状的模型上测量（ZeRO 为模拟，all-gather 的参数不测）：",
        "heads": ("设置", "项目", "字节", f"{MODEL}，{TOKENS.batch} × {TOKENS.seq} 个 token"),
        "sum": "合计",
        "host": "（在主存）",
        "letters": "字母",
        "why": "推导",
        "peak": "**一步的峰值**是权重、优化器状态与其他模型，再加四个时刻中最大的一个：计算损失时（激活值与 logits）；"
        "最后一个 block 的反向"
        "（激活值与途经的梯度）；第一个 block 的反向（它的激活值与几乎全部梯度）；"
        "结束时（全部梯度，共享的 embedding 算两份）。",
        "matrix": "方法对照",
        "numbers": "加上你自己运行的数字：",
        "module": "模块",
        "formulas": "各模块的公式",
    },
}


def pages() -> dict[str, str]:
    """File name → Markdown."""
    return {f"CHEAT_SHEET{end}.md": page(lang) for lang, end in zip(LANGUAGES, ("", ".zh-CN"), strict=True)}


def page(lang: str) -> str:
    words = WORDS[lang]
    lines = [f"# {words['title']}", "", words["made"], "", f"## {words['memory']}", "", words["measure"], ""]
    lines += ["```sh", "python -m finetune memory sft --toy --measure", "```", "", *memory(lang), ""]
    lines += [f"### {words['letters']}", "", *letters(lang), "", f"### {words['why']}", "", *derivations(lang)]
    lines += [words["peak"], "", f"## {words['matrix']}", "", *matrix(lang), ""]
    command = "python -m finetune compare" + ("" if lang == "en" else f" --lang {lang}")
    lines += [words["numbers"], "", "```sh", command, "```", "", f"## {words['formulas']}", "", *formulas(lang)]
    return "\n".join(lines)


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads), *rows)]


def memory(lang: str) -> list[str]:
    rows, words = [], WORDS[lang]
    for entry in ENTRIES:
        terms = entry.predicted(SHAPE, TOKENS)
        for i, term in enumerate(terms.values()):
            name = term.name if lang == "en" else TERMS[term.name]
            name += words["host"] if term.host else ""
            setting = f"**{entry.name[LANGUAGES.index(lang)]}**" if i == 0 else ""
            rows.append((setting, name, f"`{term.formula}`", cli.size(term.bytes)))
        if len(terms) > 1 and "activations of a block" not in terms:
            rows.append(
                ("", words["sum"], "", f"**{cli.size(sum(term.bytes for term in terms.values() if not term.host))}**")
            )
    return table(words["heads"], rows)


def letters(lang: str) -> list[str]:
    printed = "".join(term.formula for entry in ENTRIES for term in entry.predicted(SHAPE, TOKENS).values())
    used = {letter: meaning for letter, meaning in MEANING.items() if letter in printed}
    return [f"- `{letter}` {meaning[LANGUAGES.index(lang)]}" for letter, meaning in used.items()]


def derivations(lang: str) -> list[str]:
    lines, at = [], LANGUAGES.index(lang)
    for entry in ENTRIES:
        links = ", ".join(f"[{s}](https://arxiv.org/abs/{s.removeprefix('arXiv:')})" for s in entry.sources)
        lines += [f"**{entry.name[at]}.** {entry.why[at]} ({links})", ""]
    return lines


def matrix(lang: str) -> list[str]:
    rows = [
        (f"[{m.name}](../modules/{m.group}/{m.name})", *(m.compare[key][lang] for key in registry.COMPARED))
        for m in registry.modules()
    ]
    return table((WORDS[lang]["module"], *(HEADS[lang][key] for key in registry.COMPARED)), rows)


def formulas(lang: str) -> list[str]:
    """The first displayed formula of each module's README that has one."""
    lines = []
    for info in registry.modules():
        if found := re.search(r"\$\$.+?\$\$", (info.folder / "README.md").read_text(encoding="utf-8"), re.DOTALL):
            title = info.title if lang == "en" else info.title_zh
            lines += [f"**{title}** `{info.name}`", "", found[0], ""]
    return lines
