"""What `python -m finetune memory` prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.memory.activations import block_saved
from finetune.memory.cards import CONTEXT, verdicts
from finetune.memory.counts import parameters
from finetune.memory.formulas import MEANING, host_bytes, largest, symbols
from finetune.memory.models import PRESETS, Model, Sized
from finetune.memory.optimizers import OPTIMIZERS
from finetune.memory.plan import Plan
from finetune.memory.room import size
from finetune.memory.search import Found, instead
from finetune.memory.setup import Setup, Term

if TYPE_CHECKING:
    from rich.console import Console

PICTURES = Path("output/memory")


def headline(model: Model, setup: Setup) -> str:
    kept = "the file's own types" if model.stored and not setup.training else setup.dtype
    return f"{model.name}: {counted(model)} in {kept}, {described(setup)}, {setup.batch} × {setup.seq} tokens"


def counted(model: Model) -> str:
    count = parameters(model.shape)
    return f"{count / 1e9:.2f} billion parameters" if count >= 1e9 else f"{count / 1e6:.2f} million parameters"


def described(setup: Setup) -> str:
    """The setup in words."""
    what = "inference"
    if setup.training:
        name_of = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA"}[setup.adapter]
        kind = f"{name_of} of rank {setup.lora_rank}" if setup.lora_rank else "full fine-tuning"
        names = setup.whole.split(",") if setup.whole else []
        kind += f" and {', '.join(names) if len(names) < 5 else f'{len(names)} modules'} whole" if names else ""
        kind = f"a prompt of {setup.prompt}" if setup.prompt else kind
        kind = f"a prefix of {setup.prefix}" if setup.prefix else kind
        kind += f" over {setup.quantized}" if setup.quantized != "none" else ""
        what = f"{kind} with {OPTIMIZERS[setup.optimizer].name}"
        what += {"none": "", "block": ", checkpointed", "selective": ", attention computed again"}[setup.checkpointing]
        what += f", {setup.attention} attention, {setup.loss} loss"
        what += f", {setup.algorithm}" if setup.algorithm != "sft" else ""
    elif setup.quantized != "none":
        what += f" over {setup.quantized}"
    what += f", one of {setup.ranks} ranks with ZeRO-{setup.zero}" if setup.ranks > 1 else ""
    what += f", tensor-parallel over {setup.tp}" if setup.tp > 1 else ""
    what += f", {setup.pp} pipeline stages" if setup.pp > 1 else ""
    what += f", {setup.offload} in the host's memory" if setup.offload != "none" else ""
    return what


def show(model: Model, setup: Setup) -> None:
    """The table of the terms, their letters, what a block keeps, alternatives, and where it fits."""
    from finetune.runs import display, machine

    console = display.console()
    shape = largest(model.shape, setup)
    terms = model.predict(setup)
    display.say(console, headline(model, setup), "bold")
    listing(console, terms)
    values = symbols(model.shape, setup)
    shown = [term.formula for term in terms[:-1] if term.name != "step growth"]
    used = [key for key in values if any(key in re.findall(r"[A-Za-z]", formula) for formula in shown)]
    display.say(console, " · ".join(f"{key} = {values[key]:,} ({MEANING[key][0]})" for key in used), "dim")
    if setup.tp * setup.pp > 1:
        stage = {(True, True): "", (True, False): "first ", (False, True): "last "}[shape.first, shape.last]
        where = f"the {stage}pipeline stage, which needs most" if stage else "a tensor-parallel rank"
        display.say(console, f"Letters and bytes are those of {where}.", "dim")
    if setup.training and setup.checkpointing != "block":
        saved = block_saved(shape, setup)
        each = sum(count for count, _ in saved.values())
        console.print(f"\nOne block keeps {size(each)} a token for its backward pass:")
        listing(console, [Term(what, count, text, "") for what, (count, text) in saved.items()])
    console.print("\nThe peak would be")
    for option, peak in instead(model, setup).items():
        console.print(f"  {size(peak):>11}  with {option}")
    fits(console, terms[-1].bytes, setup.devices)
    total = machine.total_memory_bytes()
    host = host_bytes(terms)
    verdict = "fits" if terms[-1].bytes + host < total else "does not fit"
    if host:
        display.say(console, f"The host needs {size(host)} for each device.")
    display.say(console, f"This machine has {size(total)} of main memory: it {verdict} here.")


def show_plan(name: str, plan: Plan) -> None:
    """The table of a module's own terms, their letters, what an image keeps, and where it fits."""
    from finetune.runs import display, machine

    console = display.console()
    display.say(console, f"{name}: {plan.what}, {plan.parameters / 1e6:.2f} million parameters", "bold")
    listing(console, [*plan.terms, plan.peak])
    display.say(console, " · ".join(f"{key} = {n:,} ({text})" for key, (n, text) in plan.letters.items()), "dim")
    if plan.parts:
        console.print(f"\nOne image keeps {size(sum(part.bytes for part in plan.parts))} for its backward pass:")
        listing(console, [*plan.parts])
    fits(console, plan.peak.bytes, 1)
    total = machine.total_memory_bytes()
    verdict = "fits" if plan.peak.bytes < total else "does not fit"
    display.say(console, f"This machine has {size(total)} of main memory: it {verdict} here.")


def fits(console: Console, needed: int, devices: int) -> None:
    """The cards and what they have left."""
    from finetune.runs import display

    of = f", each of {devices}" if devices > 1 else ""
    rows: list[Any] = []
    for row in verdicts(needed):
        left = row["left"]
        verdict = (f"fits, {size(left)} free", "green") if left >= 0 else (f"{size(-left)} too small", "dim")
        rows.append([row["card"], size(row["bytes"]), size(row["usable"]), verdict])
    console.print()
    display.table(console, (f"fits on{of}", ">memory", ">for tensors", ""), rows)
    note = f"For tensors: without the {CONTEXT >> 20:,} MiB that CUDA's context and kernels take."
    display.say(console, note, "dim")


def show_found(model: Model, found: list[Found], room: int) -> None:
    """The settings that `search` found, each with its command."""
    from finetune.runs import display

    console = display.console()
    seq = found[0].setup.seq
    display.say(console, f"{model.name}: {counted(model)}, rows of {seq} tokens, {size(room)} for tensors", "bold")
    for at, each in enumerate(found, 1):
        setup = each.setup
        console.print()
        rows = "1 row" if setup.batch == 1 else f"{setup.batch} rows"
        text = f"{at}. {rows} at once, {setup.dtype}, {described(setup)}: {size(each.peak)}"
        display.say(console, text)
        console.print(f"   {each.command}", style="cyan", markup=False, highlight=False, soft_wrap=True)
    console.print()
    note = (
        "The fastest first, by FLOPs and bytes moved for a token (finetune/memory/search.py); nothing was timed. The "
    )
    note += "fastest of each kind (all weights, adapters, quantized) comes before further ones of the same kind."
    display.say(console, note, "dim")


def pictured(name: str) -> Path:
    """Where the picture of a model is kept; a path is not followed."""
    return PICTURES / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-')}.png"


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
    path = pictured(name)
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
    from finetune.runs import display, registry

    console = display.console()
    ways = (
        ("MODULE [--toy] [--key value …]", "what a run of the module needs (its settings: run MODULE --help)"),
        ("MODEL [--key value …]", "what training or inference of a well-known model needs"),
        ("config.json, FOLDER", "of a model in Hugging Face's files; no weights are read"),
        ("OWNER/NAME", "of a model on the hub, of which only config.json is fetched"),
        ("FILE.gguf", "of llama.cpp's file: inference in the file's own types, training in --dtype"),
        ("--layers 32 --dim 4096 …", "of a model by its sizes"),
        ('… --for "24 GiB"', "the three fastest settings that fit, and the commands to run them; or a card's name"),
        ("… --measure", "every formula measured on models of that shape; a table and output/memory/NAME.png"),
        ("… --simulate", "of a model that does not fit: a step in shapes only (torch's fake tensors)"),
    )
    display.table(console, ("memory", "what it shows"), [[(left, "bold cyan"), text] for left, text in ways])
    modules = ", ".join(info.name for info in registry.modules()) or "none yet"
    display.say(console, f"modules: {modules}", indent="  ")
    display.say(console, f"models: {', '.join(PRESETS)}", indent="  ")
    console.print()
    options(console, Setup)
    kinds: list[Any] = [[(name, "bold cyan"), kind.summary] for name, kind in OPTIMIZERS.items()]
    display.table(console, ("--optimizer", "what it keeps of a trained parameter"), kinds)
    options(console, Sized)


def options(console: Console, kind: type[Setup]) -> None:
    """A table of the settings of `kind` that its parent has not."""
    from finetune.runs import config, display

    own = kind.__annotations__
    rows: list[Any] = []
    group = ""
    for field in config.describe(kind):  # type: ignore[arg-type]
        if field.name in own:
            if field.group != group:
                group = field.group
                rows.append([(group, "bold"), "", "", ""])
            name = (f"--{config.dashed(field.name)}", "bold cyan")
            rows.append([name, field.type_name, str(field.default), field.help])
    display.table(console, ("setting" if kind is Setup else "size", "type", "default", "what it is"), rows)
