"""The deliberate faults of the CUDA kernels (`BUG("op.name")` in csrc/cuda), and what catches each.

A kernel that passes its tests shows little if a broken one would pass them too. So every kernel carries faults that a
test can switch on in the emulator, lists them under "Faults:" in its head comment, and each must be rejected: by wrong
numbers in the plain build, or by the checked build (`finetune.emulator`). What makes a kernel only slow comes after
them, under "Slow:"; tests of the op count its accesses to see that.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from finetune import ops
from finetune.kernels import beyond, emulator
from finetune.ops._check import WrongResult, check_close, flat, run, unchanged
from finetune.ops._op import Sample

FOLDER = emulator.ROOT / "csrc" / "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Verdict:
    """What became of one fault. `by`: "numbers", "emulator" (a deadlock and the like, which the plain build sees too)
    or "checker"; None if it survived. `reached`: did any kernel come by it?"""

    op: str
    fault: str
    by: str | None
    reached: bool
    sample: str = ""
    dtype: str = ""
    message: str = ""


def kernels() -> list[str]:
    """The ops that have a CUDA kernel."""
    return [op for op in ops.REGISTRY if (FOLDER / f"{op}.cu").exists()]


def listed(op: str, slow: bool = False) -> list[str]:
    """The faults in the head comment of csrc/cuda/<op>.cu: the wrong ones, or the slow ones."""
    head = re.match(r"(?://.*\n)+", (FOLDER / f"{op}.cu").read_text())
    wrong, _, slower = (head[0] if head else "").partition("Faults:")[2].partition("Slow:")
    return re.findall(r"\b[a-z0-9_]+\.(?!(?:cuh?|h|py|cpp)\b)[a-z0-9_]+", slower if slow else wrong)


def written(op: str) -> set[str]:
    """The faults in the code of csrc/cuda/<op>.cu and of what it includes from that folder."""
    todo, seen, names = [FOLDER / f"{op}.cu"], set(), set()
    while todo:
        path = todo.pop()
        if path not in seen and path.exists():
            seen.add(path)
            text = path.read_text()
            names |= set(re.findall(r'\bBUG\("([^"]+)"\)', text))
            todo += [path.parent / name for name in re.findall(r'#include "([^"]+)"', text)]
    return names


def mismatches() -> list[str]:
    """Faults that are listed but not written, or written but listed by no kernel that has them; lists that do not begin
    a line of the head comment (a formatter has moved them into its prose)."""
    everywhere = {
        name for path in FOLDER.rglob("*.cu*") for name in re.findall(r'\bBUG\("([^"]+)"\)', path.read_text())
    }
    lists = {op: listed(op) + listed(op, slow=True) for op in sorted(path.stem for path in FOLDER.glob("*.cu"))}
    absent = [
        f"{op} lists {name}, which is not in its code" for op in lists for name in lists[op] if name not in written(op)
    ]
    named = {name for names in lists.values() for name in names}
    moved = [
        f"{op}.cu: '{word}' does not begin its line"
        for op in lists
        for word in ("Faults:", "Slow:")
        for line in (FOLDER / f"{op}.cu").read_text().splitlines()
        if word in line and not line.startswith(f"// {word}")
    ]
    return absent + moved + [f"{name} is in no list of faults" for name in sorted(everywhere - named)]


def samples(op: str) -> list[Sample]:
    """Those of the tests, smallest first."""
    return sorted(
        (s for s in ops.REGISTRY[op].samples() if not s.bench), key=lambda s: sum(t.numel() for t in flat(s.args))
    )


@functools.cache
def cases(op: str) -> tuple[tuple[Sample, torch.dtype], ...]:
    return tuple((sample, dtype) for sample in samples(op) for dtype in DTYPES)


@functools.cache
def expected(op: str, index: int) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """torch's results and the exact ones of one of `cases`."""
    sample, dtype = cases(op)[index]
    hows = [how for how in ("reference", ops.REGISTRY[op].torch_kernel) if how]
    return [run(op, sample, dtype, how) for how in hows], run(op, sample, dtype, "reference", wide=True)


def check_case(case: beyond.Case, backend: str) -> None:
    """Raises WrongResult unless the case's pairs agree."""
    for got, want in case(backend):
        if not unchanged(got, want):
            raise WrongResult(f"{case.__name__}: {got} instead of {want}")


def told(op: str, error: RuntimeError) -> str:
    """What the emulator says, without torch's words around it."""
    return str(error).splitlines()[0].partition(f"finetune::{op}")[2].partition(": ")[2] or str(error)


def judge(op: str, fault: str) -> Verdict:
    """Runs the fault's case in `beyond`, if it has one, and the op's samples with this fault, on the checked and on the
    plain build, until something notices. The checked build goes first: where a fault reads a wild address it says so,
    and the plain one ends the process."""
    builds = {name: emulator.load(name) for name in ("checked", "emulated")}
    reached = False
    try:
        for build in builds.values():
            build.set_bug(fault)
        for name, build in builds.items() if fault in beyond.CASES else ():
            try:
                check_case(beyond.CASES[fault], name)
            except WrongResult as error:
                return Verdict(op, fault, "numbers", build.bug_reached(), "beyond", "float16", str(error))
            except RuntimeError as error:
                by = "checker" if name == "checked" else "emulator"
                return Verdict(op, fault, by, build.bug_reached(), "beyond", "float16", told(op, error))
        for index, (sample, dtype) in enumerate(cases(op)):
            if ops.REGISTRY[op].why_not("emulated", *sample.cast(dtype), **sample.kwargs):
                continue
            by_torch, exact = expected(op, index)
            for name, build in builds.items():
                where = sample.name, str(dtype).removeprefix("torch.")
                try:
                    check_close(run(op, sample, dtype, name), by_torch, exact, dtype)
                except WrongResult as error:
                    return Verdict(op, fault, "numbers", build.bug_reached(), *where, str(error))
                except RuntimeError as error:
                    by = "checker" if name == "checked" else "emulator"
                    return Verdict(op, fault, by, build.bug_reached(), *where, told(op, error))
                reached |= build.bug_reached()
    finally:
        for build in builds.values():
            build.set_bug("")
    return Verdict(op, fault, None, reached)


def judge_all(op: str | None = None) -> Iterator[Verdict]:
    """Every fault of one op, or of all."""
    for name in [op] if op else kernels():
        for fault in listed(name):
            yield judge(name, fault)
