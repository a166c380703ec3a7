"""What catches each deliberate fault of the CUDA kernels.

A kernel that passes its tests shows little if a broken one would pass them too. So every kernel has faults (its
`.faults` file, see weave.py) that a test switches on in the emulator. Each must be rejected: by wrong numbers in the
plain build, or by the checked build (emulator.py). What only makes a kernel slow is for tests that count its accesses.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune import ops
from finetune.kernels import emulator, extra_cases, weave
from finetune.ops._check import WrongResult, check_close, flat, run, unchanged
from finetune.ops._samples import Sample

FOLDER = (emulator.ROOT / "csrc" / "cuda").resolve()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one fault. `by`: "numbers", "emulator" (a deadlock and the like, which the plain build sees too)
    or "checker"; None if it survived. `reached`: did any kernel execute its line?"""

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
    """The faults that are tried on a kernel: those of its files that make it wrong (or slow), and the shared ones."""
    sidecar = weave.read(FOLDER / f"{op}.faults")
    own = [fault.name for fault in sidecar.faults if fault.is_slow == slow]
    return own + ([] if slow else list(sidecar.shared))


def written(op: str, edits: dict[Path, list[weave.Edit]]) -> set[str]:
    """Those of the edits' faults that are in csrc/cuda/<op>.cu or in what it includes from that folder."""
    found = {FOLDER / f"{op}.cu"}
    todo, names = list(found), set()
    while todo:
        path = todo.pop()
        text = path.read_text() if path.exists() else ""
        names |= {edit.fault for edit in edits.get(path, ())}
        included = {path.parent / name for name in re.findall(r'#include "([^"]+)"', text)}
        todo += included - found
        found |= included
    return names


def mismatches() -> list[str]:
    """Faults that a kernel lists without having them, and faults that no kernel lists."""
    edits = weave.edits_of(FOLDER)
    lists = {path.stem: listed(path.stem) + listed(path.stem, slow=True) for path in sorted(FOLDER.glob("*.cu"))}
    absent = [
        f"{op} lists {name}, which is not in its code"
        for op, names in lists.items()
        for name in sorted(set(names) - written(op, edits))
    ]
    everywhere = {edit.fault for each in edits.values() for edit in each}
    listed_somewhere = {name for names in lists.values() for name in names}
    return absent + [f"{name} is tried on no kernel" for name in sorted(everywhere - listed_somewhere)]


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


def check_case(case: extra_cases.Case, backend: str) -> None:
    """Raises WrongResult unless the case's pairs agree."""
    for got, want in case(backend):
        if not unchanged(got, want):
            raise WrongResult(f"{case.__name__}: {got} instead of {want}")


def told(op: str, error: RuntimeError) -> str:
    """The emulator's message, without torch's words around it."""
    return str(error).splitlines()[0].partition(f"finetune::{op}")[2].partition(": ")[2] or str(error)


def judge(op: str, fault: str) -> Verdict:
    """Runs the fault's extra case, if it has one, and the op's samples with this fault, on the checked and on the
    plain build, until something notices. The checked build goes first: where a fault reads a wild address it says so,
    and the plain one ends the process."""
    builds = {name: emulator.load(name) for name in ("checked", "emulated")}
    reached = False
    try:
        for build in builds.values():
            build.set_bug(fault)
        for name, build in builds.items() if fault in extra_cases.CASES else ():
            try:
                check_case(extra_cases.CASES[fault], name)
            except WrongResult as error:
                return Verdict(op, fault, "numbers", build.bug_reached(), "extra case", "float16", str(error))
            except RuntimeError as error:
                by = "checker" if name == "checked" else "emulator"
                return Verdict(op, fault, by, build.bug_reached(), "extra case", "float16", told(op, error))
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
