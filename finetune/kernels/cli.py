"""`python -m finetune kernels …`: the CUDA kernels without a GPU. A command is a function with `@kernels.command()`;
like all of the command line it imports what it needs when it runs."""

import json as jsonlib
from pathlib import Path
from typing import Any

import rich_click as click

from finetune.errors import UserError, nearest

JSON = click.option("--json", is_flag=True, help="Print JSON on stdout; all else goes to stderr.")
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
ROOT = Path(__file__).parents[2]


@click.group()
def kernels() -> None:
    """The CUDA kernels without a GPU: memory accesses, deliberate faults, static counts."""


def find(op: str, runs: bool = True) -> str:
    """`op`, if it has a CUDA kernel; `runs`: one that runs as an op of its own, not a variant for one architecture."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        raise UserError(f"there is no {ROOT / 'csrc'}: `kernels` needs a checkout, installed by pip install -e .")
    op_files = ROOT / "finetune" / "ops"
    found = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    known = [name for name in found if not runs or (op_files / f"{name}.py").exists()]
    if op not in known:
        raise UserError(f"no CUDA kernel '{op}'{nearest(op, known)}: there are {', '.join(known)}")
    return op


@kernels.command()
@click.argument("op")
@click.option("--sample", "name", help="One of the op's samples (see its op file); default: the largest of the tests.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="f16", show_default=True)
@click.option(
    "--shape", help="Of the first tensor instead, such as 4x64; the others' follow where they are its suffix."
)
@click.option("--forward", is_flag=True, help="Without the backward.")
@JSON
def trace(op: str, name: str | None, dtype: str, shape: str | None, forward: bool, json: bool) -> None:
    """Count a kernel's memory accesses by source line: sectors and bank conflicts, next to the fewest possible."""
    import dataclasses

    import torch

    from finetune import ops
    from finetune.kernels import emulator, faults
    from finetune.ops._check import run
    from finetune.runs import display

    find(op)
    samples = {s.name: s for s in faults.samples(op)}
    if name and name not in samples:
        raise UserError(f"{op} has no sample '{name}'{nearest(name, samples)}: there are {', '.join(samples)}")
    sample = samples[name] if name else list(samples.values())[-1]
    if shape:
        sample = reshaped(sample, shape)
    if forward:
        sample = dataclasses.replace(sample, grad=())
    kind = getattr(torch, DTYPES[dtype])
    emulator.load("checked")
    if reason := ops.REGISTRY[op].why_not("checked", *sample.cast(kind), **sample.kwargs):
        raise UserError(f"{op}: sample '{sample.name}' in {DTYPES[dtype]}: {reason}")
    rows = emulator.trace(lambda: run(op, sample, kind, "checked"))
    if json:
        return click.echo(jsonlib.dumps(rows, indent=2))
    shapes = ", ".join(str(tuple(t.shape)) for t in sample.args if isinstance(t, torch.Tensor))
    console = _console()
    display.say(console, f"\n{op}, sample '{sample.name}': {shapes}, {DTYPES[dtype]}\n", "bold")
    _print_trace(console, rows)
    console.print(
        "A request is a warp's, width the bytes a lane; its units are 32-byte sectors of global memory or wavefronts "
        "of shared memory (one 4-byte word from each of 32 banks), the ideal as few as would do.\n",
        style="dim",
    )
    return None


def reshaped(sample: Any, shape: str) -> Any:
    """The sample with other sizes: its first tensor gets `shape`, those whose shapes are suffixes of it follow."""
    import dataclasses

    import torch

    try:
        new = tuple(int(word) for word in shape.lower().replace(",", "x").split("x"))
    except ValueError:
        raise UserError(f"--shape {shape}: expected sizes such as 4x64") from None
    tensors = [arg for arg in sample.args if isinstance(arg, torch.Tensor)]
    old = tuple(tensors[0].shape) if tensors else ()
    fits = all(isinstance(a, torch.Tensor) or not isinstance(a, (list, tuple)) for a in sample.args)
    fits &= all(t.is_floating_point() and t.dim() and old[-t.dim() :] == tuple(t.shape) for t in tensors)
    if not fits or len(new) != len(old) or min(new) < 0:
        raise UserError(
            f"--shape {shape}: sample '{sample.name}' has {[tuple(t.shape) for t in tensors]}; choose --sample"
        )
    g = torch.Generator().manual_seed(0)
    args = tuple(
        torch.randn(new[-a.dim() :], generator=g, dtype=torch.float64) if isinstance(a, torch.Tensor) else a
        for a in sample.args
    )
    return dataclasses.replace(sample, name=shape, given=args)


def _print_trace(console: Any, rows: list[dict[str, Any]]) -> None:
    """A line of source, and below it what it does."""
    from finetune.runs import display

    shown: list[Any] = []
    before = None
    for row in rows:
        where = f"{Path(row['file']).name}:{row['line']}"
        if where != before:
            shown.append((f"{where}  {row['source'].strip()}", "bold"))
        before = where
        excess = row["units"] / row["ideal"] if row["ideal"] else None
        numbers = [f"{row[key]:,}" if row["ideal"] or key == "requests" else "" for key in TRACED]
        cells = ["  " + row["kind"], *numbers, "" if excess is None else f"{excess:.2f}"]
        shown.append([(cell, "yellow" if (excess or 0) > 1 else "") for cell in cells])
    display.table(console, ("what", *(f">{key}" for key in TRACED), ">×"), shown)


TRACED = ("requests", "width", "units", "ideal")


@kernels.command()
@click.argument("op", required=False)
@JSON
def faults(op: str | None, json: bool) -> int:
    """Run every deliberate fault of the kernels: what catches it? Exit code 1 if one survives."""
    import dataclasses

    from finetune.kernels import faults as engine
    from finetune.runs import display

    ops = [find(op)] if op else engine.kernels()
    todo = [(name, fault) for name in ops for fault in engine.listed(name)]
    console = _console(stderr=json)
    mismatches = engine.mismatches()
    for line in mismatches:
        display.say(console, line, "red")
    verdicts = []
    with display.progress(console, "faults", 0, len(todo)) as show:
        for name, fault in todo:
            verdicts.append(engine.judge(name, fault))
            show(len(verdicts), {})
    survivors = [v for v in verdicts if not v.by or not v.reached]
    if json:
        click.echo(jsonlib.dumps([dataclasses.asdict(v) for v in verdicts], indent=2, ensure_ascii=False))
    else:
        rows: list[Any] = []
        for v in verdicts:
            by = v.by or ("nothing", "red")
            how = v.message if v.reached else ("no sample reaches it", "red")
            rows.append([v.op, v.fault.removeprefix(f"{v.op}."), by, f"{v.sample} {v.dtype}", how])
        display.table(console, ("op", "fault", "caught by", "on", "how"), rows)
        console.print(f"{len(verdicts) - len(survivors)} of {len(verdicts)} caught", highlight=False)
    return 1 if survivors or mismatches else 0


@kernels.command()
@click.argument("topic", required=False)
@click.option("--level", "number", type=int, help="Only this one, by source line.")
@click.option("--size", type=click.Choice(["small", "large"]), default="small", show_default=True)
@click.option("--markdown", is_flag=True, help="As the module's README has it.")
@click.option("--debug", is_flag=True, help="Run --level once, compiled for a debugger (see the module's README).")
@JSON
def levels(topic: str | None, number: int | None, size: str, markdown: bool, debug: bool, json: bool) -> None:
    """The ladder of the cuda module: what each level does to memory, compared with the level before it."""
    from finetune.runs import display, registry
    from finetune.runs.machine import physical_cores

    ladder = registry.load(registry.find("cuda"))
    if topic and topic not in ladder.TOPICS:
        raise UserError(f"no topic '{topic}'{nearest(topic, ladder.TOPICS)}: there are {', '.join(ladder.TOPICS)}")
    console = _console(stderr=json)
    if number is not None:
        chosen = [level for level in ladder.levels(topic) if topic and level.number == number]
        if not chosen:
            raise UserError(f"--level {number}: name a topic, and a level from 1 to its last")
        problem = ladder.TOPICS[topic](*ladder.SIZES[size][topic])
        if debug:
            result = problem.run(ladder.load(chosen[0], "debug"))
            console.print(f"{chosen[0].path.name}: within {problem.check(result):.3g} of float64", highlight=False)
            return None
        rows = ladder.lines(chosen[0], problem)
        if json:
            return click.echo(jsonlib.dumps(rows, indent=2, ensure_ascii=False))
        console.print(f"\n{chosen[0].idea}\n", highlight=False, markup=False)
        _print_trace(console, rows)
        return None
    if debug:
        raise UserError("--debug needs a topic and --level")
    topics = [topic] if topic else list(ladder.TOPICS)
    display.say(
        display.console(stderr=True), "compiling what has changed of the levels (minutes the first time) …", "dim"
    )
    ladder.build_all([level for name in topics for level in ladder.levels(name)], "checked", physical_cores())
    found = {name: ladder.climb(name, size) for name in topics}
    if json:
        return click.echo(jsonlib.dumps({k: [c.to_dict() for c in v] for k, v in found.items()}, indent=2))
    for name, counts in found.items():
        if markdown:
            click.echo(ladder.page_table(name, counts))
            continue
        rows = ladder.table(counts)
        heads = [f">{name}" if name in ("FLOP/byte", "conflicts") else name for name in rows[0]]  # gains may wrap
        sizes = " × ".join(map(str, ladder.SIZES[size][name]))
        cells = [[text.replace("(÷ ", "(÷").replace("(× ", "(×") for text in row.values()] for row in rows]
        display.table(console, heads, cells, f"{name} {sizes}")
    return None


@kernels.command()
@click.argument("ops", nargs=-1, metavar="[OP]…")
@click.option("--arch", "archs", multiple=True, help="80, 90a, 100a or 120; may be given several times. Default: all.")
@click.option("--write", is_flag=True, help="Into the table that the tests expect (assets/kernels_static.json).")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Compilers at once.")
@JSON
def static(ops: tuple[str, ...], archs: tuple[str, ...], write: bool, jobs: int, json: bool) -> None:
    """What nvcc makes of the kernels: registers, spills, occupancy, instructions, access widths."""
    from finetune.kernels import static_table

    if write and archs:
        raise UserError("--write needs all architectures: omit --arch")
    rows = static_table.table([find(op, runs=False) for op in ops], archs or static_table.ARCHS, jobs)
    if write:
        static_table.write(rows)
    if json:
        return click.echo(jsonlib.dumps({"toolkit": static_table.toolkit(), "kernels": rows}, indent=2))
    console = _console()
    for op, by_arch in rows.items():
        for arch, found in by_arch.items():
            _static_table(console, f"{op} sm_{arch}", found)
    console.print("loads and stores: number × bytes a lane; occupancy: without dynamic shared memory", highlight=False)
    return None


def _static_table(console: Any, title: str, found: dict[str, dict[str, Any]]) -> None:
    from finetune.runs import display

    def widths(counts: dict[str, int]) -> str:
        return " ".join(f"{n}×{size}" for size, n in sorted(counts.items(), key=lambda item: -int(item[0])))

    counts = ("threads", "registers", "stack", "spills", "shared")
    rows: list[Any] = []
    for name, row in found.items():
        code = " ".join(f"{word} {n}" for word, n in row["code"].items() if word not in ("LDG", "STG"))
        numbers = [str(row[column]) for column in counts]
        rows.append((name, "bold"))
        rows.append([*numbers, f"{row['occupancy']:.0%}"])
        rows.append((f"  loads {widths(row['load'])} · stores {widths(row['store'])} · {code}", "dim"))
    heads = [*(f">{column}" for column in counts), ">occupancy"]
    display.table(console, heads, rows, title)


def _console(stderr: bool = False) -> Any:
    from finetune.runs import display

    return display.console(stderr)
