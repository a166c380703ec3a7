"""`python -m finetune memory MODEL [--key value …]`: the memory of training or inference by the formulas; nothing is
loaded or trained. MODEL is a module, a well-known model, a config.json, a model folder, a hub id or a .gguf file, or
sizes (--layers … --dim …). --measure and --simulate add a column to compare, --for searches what fits."""

from __future__ import annotations

import contextlib
import dataclasses
import json as jsonlib
from collections.abc import Sequence
from typing import Any

from finetune.errors import UserError
from finetune.memory import models
from finetune.memory.cards import budget, verdicts
from finetune.memory.counts import parameters
from finetune.memory.formulas import host_bytes, predict, symbols
from finetune.memory.models import GIVEN, Model
from finetune.memory.plan import Plan
from finetune.memory.room import size
from finetune.memory.search import instead, search
from finetune.memory.setup import Setup

MODELS = models.PRESETS
MODES = ("--measure", "--simulate")


def main(argv: list[str], json: bool = False) -> int:
    """Prints the table; UserError for an unknown name or option, with the nearest known one."""
    from finetune.memory import show

    words = [word for word in argv if word not in ("-h", "--help", *MODES)]
    modes = [word for word in argv if word in MODES]
    if len(words) + len(modes) < len(argv) or not words:
        show.usage()
        return 0
    words, room = budget_of(words)
    if len(modes) + (room is not None) > 1:
        raise UserError("--measure, --simulate or --for, one of them")
    name, rest = (GIVEN, words) if words and words[0].startswith("--") else (words[0], words[1:]) if words else ("", [])
    if name == GIVEN and not any(word.startswith(("--layers", "--dim")) for word in rest):
        begin = " ".join(rest[:2])
        raise UserError(f"the model comes first: memory MODEL {begin} …, or its sizes: --layers 32 --dim 4096")
    if isinstance(found := models.plan_of(name, rest), Plan):
        return of_plan(name, found, modes, room, json)
    model, setup, given = models.find(name, rest)
    if room is not None:
        if model.module:
            raise UserError(f"--for is for models, not for the module '{name}': give the model that it trains")
        found = search(model, setup, given, room)
        if json:
            print(jsonlib.dumps([dataclasses.asdict(each) for each in found], indent=2, ensure_ascii=False))
        else:
            show.show_found(model, found, room)
        return 0
    if not json:
        show.show(model, setup)
    rows = measured(model, setup) if modes == ["--measure"] else simulated(model, setup) if modes else []
    if json:
        print(jsonlib.dumps(as_json(model, setup) | {"rows": rows}, indent=2, ensure_ascii=False))
    elif rows:
        show.show_rows(model.name, rows)
    return 0


def of_plan(name: str, plan: Plan, modes: list[str], room: int | None, json: bool) -> int:
    """A module with a network of its own kind."""
    from finetune.memory import show

    if room is not None or "--simulate" in modes:
        raise UserError(f"--for and --simulate are for language models; --measure is for a module such as '{name}'")
    if not json:
        show.show_plan(name, plan)
    rows = plan.rows() if modes else []
    if json:
        terms = [dataclasses.asdict(term) for term in (*plan.terms, plan.peak)]
        print(jsonlib.dumps({"name": name, "parameters": plan.parameters, "terms": terms, "rows": rows,
                             "cards": verdicts(plan.peak.bytes)}, indent=2, ensure_ascii=False))  # fmt: skip
    elif rows:
        show.show_rows(name, rows)
    return 0


def budget_of(words: Sequence[str]) -> tuple[list[str], int | None]:
    """The words without `--for SIZE`, and the bytes for tensors that SIZE leaves; `24 GiB` may be two words."""
    rest, room = [], None
    words = list(words)
    while words:
        word = words.pop(0)
        key, equals, text = word.partition("=")
        if key != "--for":
            rest.append(word)
            continue
        if not equals:
            taken = []
            while words and not words[0].startswith("--"):
                taken.append(words.pop(0))
            text = " ".join(taken)
        room = budget(text)
    return rest, room


def plan(name: str, argv: list[str]) -> tuple[Any, Setup]:
    """Model config and setup of a module under the settings in argv, or of a model."""
    model, setup, _ = models.find(name, argv)
    return model.config, setup


def measured(model: Model, setup: Setup) -> list[dict[str, Any]]:
    """The setup and the cheat sheet's settings, on live tensors of models of this shape."""
    from finetune.memory import lab
    from finetune.runs import display, machine

    if setup.devices > 1 or setup.offload != "none":
        raise UserError("--measure is for one rank, without offload: --simulate is for several")
    needed, room = predict(model.shape, setup)[0].bytes, machine.available_memory_bytes()
    if room and needed > lab.ROOM * room:
        raise UserError(
            f"{model.name} has {size(needed)} of weights, {size(room)} are free here: --simulate needs none"
        )
    console = display.console(stderr=True)
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def progress(done: int, of: int) -> None:
            if not bars:
                bars.append(stack.enter_context(display.progress(console, "measuring", 0, of)))
            if done:
                bars[0](done, {})

        return lab.measure(model.config, setup, progress)


def simulated(model: Model, setup: Setup) -> list[dict[str, Any]]:
    """One step in shapes only."""
    from finetune.memory.simulate import scaled

    if model.module:
        raise UserError(f"--simulate is for models; --measure is for a module such as '{model.name}'")
    config = model.config if isinstance(model.config, dict) else dataclasses.asdict(model.config)
    found = scaled(config, setup)
    return [
        {"name": term.name, "predicted": term.bytes, "measured": found[term.name], "simulated": True}
        for term in predict(model.shape, setup)
        if term.name in found
    ]


def as_json(model: Model, setup: Setup) -> dict[str, Any]:
    terms = model.predict(setup)
    return {
        "name": model.name,
        "parameters": parameters(model.shape),
        "shape": dataclasses.asdict(model.shape),
        "setup": dataclasses.asdict(setup),
        "symbols": symbols(model.shape, setup),
        "terms": [dataclasses.asdict(term) for term in terms],
        "host_bytes": host_bytes(terms),
        "instead": instead(model, setup),
        "cards": verdicts(terms[-1].bytes),
    }
