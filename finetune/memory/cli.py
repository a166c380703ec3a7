"""`python -m finetune memory MODULE [--toy] [--key value …]` and `memory MODEL [--batch 8 --seq 4096 …]`: the memory
of training by the formulas, without loading or training anything. --measure and --simulate add a column to compare."""

from __future__ import annotations

import contextlib
import dataclasses
import json as jsonlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, nearest
from finetune.lm import presets
from finetune.memory.activations import block_saved
from finetune.memory.counts import parameters
from finetune.memory.formulas import MEANING, predict, symbols
from finetune.memory.room import size
from finetune.memory.setup import Setup, Shape, Term, shape_of

if TYPE_CHECKING:
    from rich.console import Console

MODELS: dict[str, dict[str, Any]] = {**presets.LLAMA, **presets.GPT}
MODES = ("--measure", "--simulate")
PICTURES = Path("output/memory")


def main(argv: list[str], json: bool = False) -> int:
    """Prints the table; UserError for an unknown name or option, with the nearest known one."""
    words = [word for word in argv if word not in ("-h", "--help", *MODES)]
    modes = [word for word in argv if word in MODES]
    if len(words) + len(modes) < len(argv) or not words:
        usage()
        return 0
    if len(modes) > 1:
        raise UserError("--measure or --simulate, one of them")
    name, *rest = words
    if name.startswith("-"):
        raise UserError(f"the name comes first: memory MODULE|MODEL {name} …")
    config, setup = plan(name, rest)
    shape, rows = shape_of(config), []
    if not json:
        show(name, shape, setup)
    if modes == ["--measure"]:
        rows = measured(name, config, setup)
    elif modes == ["--simulate"]:
        rows = simulated(name, config, setup)
    if json:
        print(jsonlib.dumps(as_json(name, shape, setup) | {"rows": rows}, indent=2, ensure_ascii=False))
    elif rows:
        show_rows(name, rows)
    return 0


def measured(name: str, config: Any, setup: Setup) -> list[dict[str, Any]]:
    """The setup and the cheat sheet's settings, on live tensors of models of this shape."""
    from finetune.memory import lab
    from finetune.runs import display, machine

    if setup.ranks > 1:
        raise UserError("--measure is for one rank: --simulate is for several")
    needed, room = predict(shape_of(config), setup)[0].bytes, machine.available_memory_bytes()
    if room and needed > lab.ROOM * room:
        raise UserError(f"{name} has {size(needed)} of weights, {size(room)} are free here: --simulate needs none")
    console = display.console(stderr=True)
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def progress(done: int, of: int) -> None:
            if not bars:
                bars.append(stack.enter_context(display.progress(console, "measuring", 0, of)))
            if done:
                bars[0](done, {})

        return lab.measure(config, setup, progress)


def simulated(name: str, config: Any, setup: Setup) -> list[dict[str, Any]]:
    """One step in shapes only."""
    if not isinstance(config, dict):
        raise UserError(f"--simulate is for models ({', '.join(MODELS)}); --measure is for a module such as '{name}'")
    from finetune.memory.simulate import scaled

    found = scaled(config, setup)
    return [
        {"name": term.name, "predicted": term.bytes, "measured": found[term.name], "simulated": True}
        for term in predict(shape_of(config), setup)
        if term.name in found
    ]


def plan(name: str, argv: list[str]) -> tuple[Any, Setup]:
    """Model config and setup of a module under the settings in argv, or of a well-known model."""
    from finetune.runs import config, registry

    modules = {info.name: info for info in registry.modules()}
    if name in modules:
        module = registry.load(modules[name])
        if not hasattr(module, "memory_plan"):
            raise UserError(f"module '{name}' has no memory plan; `memory` without a name lists the models it knows")
        toy, given = "--toy" in argv, config.given(module.Config, [word for word in argv if word != "--toy"], ["toy"])
        return module.memory_plan(dataclasses.replace(module.Config.toy() if toy else module.Config(), **given))
    if name in MODELS:
        return MODELS[name], Setup(**config.given(Setup, argv))  # type: ignore[arg-type]  # it has a Config's comments
    if day := registry.planned_day(name):
        raise UserError(f"module '{name}' is planned (day {day} of the path) and does not exist yet")
    hint = nearest(name, [*modules, *MODELS]) or "; `memory` without a name lists them"
    raise UserError(f"unknown module or model '{name}'{hint}")


def instead(shape: Shape, setup: Setup) -> dict[str, int]:
    """Peaks of setups that differ in one thing, by the option that makes the difference."""
    options: dict[str, dict[str, Any]] = {}
    if setup.training:
        options["--no-checkpointing" if setup.checkpointing else "--checkpointing"] = {
            "checkpointing": not setup.checkpointing
        }
        other = {"flash": "naive", "naive": "flash"}[setup.attention]
        options[f"--attention {other}"] = {"attention": other}
        other = {"chunked": "full", "full": "chunked"}[setup.loss]
        options[f"--loss {other}"] = {"loss": other}
        if setup.frozen and setup.zero < 3:
            other = "nf4_double" if setup.quantized == "none" else "none"
            options[f"--quantized {other}"] = {"quantized": other}
        if setup.quantized == "none" and not (setup.prompt or setup.prefix):
            rank = 0 if setup.lora_rank else 8
            options[f"--lora-rank {rank}"] = {"lora_rank": rank, "lora_targets": "all"}
        for stage in (1, 2, 3):
            if setup.ranks > 1 and stage != setup.zero and (stage < 3 or setup.quantized == "none"):
                options[f"--zero {stage}"] = {"zero": stage}
    other = "bf16" if setup.dtype == "fp32" else "fp32"
    options[f"--dtype {other}"] = {"dtype": other}
    if setup.training:
        options["--optimizer none"] = {"optimizer": "none"}
    return {
        option: predict(shape, dataclasses.replace(setup, **changes))[-1].bytes for option, changes in options.items()
    }


def as_json(name: str, shape: Shape, setup: Setup) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": parameters(shape),
        "shape": dataclasses.asdict(shape),
        "setup": dataclasses.asdict(setup),
        "symbols": symbols(shape, setup),
        "terms": [dataclasses.asdict(term) for term in predict(shape, setup)],
        "instead": instead(shape, setup),
    }


def headline(name: str, shape: Shape, setup: Setup) -> str:
    count = parameters(shape)
    number = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
    what = "inference"
    if setup.training:
        name_of = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA"}[setup.adapter]
        kind = f"{name_of} of rank {setup.lora_rank}" if setup.lora_rank else "full fine-tuning"
        kind = f"a prompt of {setup.prompt}" if setup.prompt else kind
        kind = f"a prefix of {setup.prefix}" if setup.prefix else kind
        kind += f" over {setup.quantized}" if setup.quantized != "none" else ""
        what = f"{kind} with {setup.optimizer.replace('adamw', 'AdamW')}"
        what += ", checkpointed" if setup.checkpointing else ""
        what += f", {setup.attention} attention, {setup.loss} loss"
        what += f", {setup.algorithm}" if setup.algorithm != "sft" else ""
        what += f", one of {setup.ranks} ranks with ZeRO-{setup.zero}" if setup.ranks > 1 else ""
    return f"{name}: {number} parameters in {setup.dtype}, {what}, {setup.batch} × {setup.seq} tokens"


def show(name: str, shape: Shape, setup: Setup) -> None:
    from finetune.runs import display, machine

    console = display.console()
    terms = predict(shape, setup)
    display.say(console, headline(name, shape, setup), "bold")
    listing(console, terms)
    values = symbols(shape, setup)
    used = [
        key
        for key in values
        if any(key in re.findall(r"\w", term.formula) for term in terms[:-1] if term.name != "step growth")
    ]
    display.say(console, " · ".join(f"{key} = {values[key]:,} ({MEANING[key][0]})" for key in used), "dim")
    if setup.training and not setup.checkpointing:
        saved = block_saved(shape, setup)
        console.print(f"\nOne block keeps {size(sum(b for b, _ in saved.values()))} a token for its backward pass:")
        listing(console, [Term(what, count, text, "") for what, (count, text) in saved.items()])
    console.print("\nThe peak would be")
    for option, peak in instead(shape, setup).items():
        console.print(f"  {size(peak):>11}  with {option}")
    total = machine.total_memory_bytes()
    verdict = "fits" if terms[-1].bytes < total else "does not fit"
    console.print(f"This machine has {size(total)}: it {verdict} here.")


def show_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """The table predicted | measured | error, and its picture."""
    from finetune.runs import display, plots
    from finetune.runs.checkpoint import writing

    only_simulated = all(row["simulated"] for row in rows)
    shown_rows: list[Any] = []
    last = ""
    for row in rows:
        setting, _, term = row["name"].rpartition(": ")
        predicted, found = row["predicted"], row["measured"]
        error = "exact" if predicted == found else f"{predicted / found - 1:+.1%}" if found else "–"
        shown = size(found) if found is not None else "–"
        note = "simulated" if row["simulated"] and not only_simulated and found is not None else ""
        name_once = setting if setting != last else ""
        shown_rows.append([name_once, term, size(predicted), shown, error, (note, "dim")])
        last = setting
    console = display.console()
    found_by = "simulated" if only_simulated else "measured"
    display.table(console, ("setting", "what", ">formula", f">{found_by}", ">error", ""), shown_rows)
    path = PICTURES / f"{name}.png"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    drawn = [row for row in rows if not row["name"].endswith("of a block")]  # a part of the row below it
    plots.memory(path, f"{name} · memory", drawn, "simulated" if only_simulated else "measured")
    console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def listing(console: Console, terms: list[Term]) -> None:
    from finetune.runs import display

    heads = ("what", ">bytes", "formula", "source")[: 4 if any(term.source for term in terms) else 3]
    rows: list[Any] = []
    for term in terms:
        bold = "bold" if term.name == "peak" else ""
        row = [(text, bold) for text in (term.name, size(term.bytes), term.formula)]
        rows.append([*row, (term.source, "dim")][: len(heads)])
    display.table(console, heads, rows)


def usage() -> None:
    from finetune.runs import config, display, registry

    console = display.console()
    ways = (
        ("MODULE [--toy] [--key value …]", "what a run of the module needs (its settings: run MODULE --help)"),
        ("MODEL [--key value …]", "what training or inference of a well-known model needs"),
        ("… --measure", "every formula measured on models of that shape; a table and output/memory/NAME.png"),
        ("… --simulate", "of a MODEL that does not fit: a step in shapes only (torch's fake tensors)"),
    )
    display.table(console, ("memory", "what it shows"), [[(left, "bold cyan"), text] for left, text in ways])
    modules = ", ".join(info.name for info in registry.modules()) or "none yet"
    display.say(console, f"modules: {modules}", indent="  ")
    display.say(console, f"models: {', '.join(MODELS)}", indent="  ")
    console.print()
    rows: list[Any] = []
    for field in config.describe(Setup):  # type: ignore[arg-type]
        rows.append([(f"--{config.dashed(field.name)}", "bold cyan"), field.type_name, str(field.default), field.help])
    display.table(console, ("setting", "type", "default", "what it is"), rows)
