"""Judging an answer: every case of a drill, in order, until one fails. Runs in the process that drills/run.py starts.

A number is right within the rounding of its sums: eps · (4 + √length) of the largest number of the result, or four
times what the solution is off by in the same type, whichever is more; the right values are computed in float64. NaN is
never right, an infinity only where one belongs. Everything else must be equal.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import linecache
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from finetune.drills import compiled
from finetune.drills.cases import Case, Draw
from finetune.drills.catalog import Drill
from finetune.kernels import alone

Verdict = dict[str, Any]  # ok, passed (cases), and of a failure: what, and its details
MOST_SHOWN = 12  # elements of an input
SEVERAL = 3  # failing cases on which a mistake must give what the learner's code gives


class Wrong(Exception):
    """What is wrong with a result: a kind, and what to fill into its sentence."""

    def __init__(self, kind: str, **details: Any) -> None:
        super().__init__(kind)
        self.kind, self.details = kind, details


Code = ModuleType | compiled.Answer


def load(name: str, path: Path, source: str | None = None) -> Code:
    """An answer, from its file; `source` in the place of what it holds."""
    return python(name, path, source) if path.suffix == ".py" else compiled.load(path, source)


def python(name: str, path: Path, source: str | None = None) -> ModuleType:
    """A Python file as a module. A source in its place has a name of its own, under which `inspect` finds its lines, as
    Triton needs."""
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec
    module = importlib.util.module_from_spec(spec)
    text = path.read_text(encoding="utf-8") if source is None else source
    module.__file__ = str(path) if source is None else f"<{name} {hash(text):x}>"
    linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module


class Judge:
    """A drill's cases, solution and way of calling an answer."""

    def __init__(self, drill: Drill) -> None:
        self.drill = drill
        self.check = python("drill_check", drill.folder / "check.py")
        self.solution = load("drill_solution", drill.solution)
        self.drive: Callable[..., Any] = getattr(self.check, "drive", None) or call(drill.text.write[0])

    def names(self) -> list[str]:
        """What the arguments of a case are called."""
        drive = getattr(self.check, "drive", None)
        called = drive or getattr(self.solution, self.drill.text.write[0])
        every = inspect.signature(called).parameters.values()
        return [each.name for each in every if each.kind is each.POSITIONAL_OR_KEYWORD][bool(drive) :]

    def cases(self) -> Iterator[Case]:
        """Made again for every answer: none sees what another changed."""
        return iter(self.check.cases(Draw(self.drill.name)))

    def result(self, code: Code, case: Case, wide: bool = False) -> Any:
        """What an answer gives for a case, and its gradients; `wide`: in float64."""
        args, kwargs = copy.deepcopy((list(case.args), case.kwargs))
        if wide:
            args, kwargs = in_float64(args), in_float64(kwargs)
        leaves = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()] if case.grad else []
        for leaf in leaves:
            leaf.requires_grad_()
        before = copy.deepcopy((detached(args), detached(kwargs)))
        reference = getattr(self.check, "reference", None) if wide else None
        with new_memory_is_nan():
            found = reference(*args, **kwargs) if reference else self.drive(code, *args, **kwargs)
        if not case.changes and not same(before, (detached(args), detached(kwargs))):
            raise Wrong("changed")
        if not case.grad:
            return found
        if not isinstance(found, Tensor):
            raise Wrong("kind", found=kind(found), expected="Tensor")
        if not found.requires_grad:
            raise Wrong("no_gradient")
        weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).sin() + 0.5
        grads = torch.autograd.grad((found.double() * weights.view(found.shape)).sum(), leaves, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
        return found.detach(), tuple(filled)

    def expected(self, case: Case) -> tuple[Any, Any]:
        """(right values in float64, what the solution gives in the types of the case)."""
        return self.result(self.solution, case, wide=True), self.result(self.solution, case)

    def outcome(self, code: Code, case: Case) -> Any:
        """What an answer gives, an exception included."""
        try:
            return self.result(code, case)
        except Wrong as wrong:
            return wrong.kind
        except Exception as error:
            return type(error).__name__

    def verdict(self, path: Path, source: str | None = None) -> Verdict:
        """How an answer does. Exceptions of the learner's code are part of it; those of the drill's are not caught."""
        verdict: Verdict = {"ok": False, "passed": 0}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                code = load("answer", path, source)
            except Exception as error:
                return verdict | failure(error, path)
            for name in self.drill.text.write if isinstance(code, ModuleType) else ():
                if not callable(getattr(code, name, None)):
                    return verdict | failure(Wrong("missing", name=name), path)
            for case in self.cases():
                right, theirs = self.expected(case)
                printed.truncate(printed.seek(0))
                try:
                    compare(self.result(code, case), right, theirs, case)
                except Exception as error:
                    verdict |= {**failure(error, path), "case": case.name, "input": shown(case, self.names())}
                    verdict["printed"] = printed.getvalue()[-2000:]
                    return verdict | {"mistake": self.mistake(code, verdict["passed"])}
                verdict["passed"] += 1
        if isinstance(code, compiled.Cuda):
            verdict["score"] = score = self.score(code)
            for what, limit in getattr(self.check, "LIMITS", {}).items():
                most = int(limit * score["least"]["sectors"]) if what == "sectors" else limit
                if score["yours"][what] > most:
                    details = {"counted": what, "found": score["yours"][what], "most": most}
                    return verdict | {"what": "slow", "details": details}
        return verdict | {"ok": True, "printed": printed.getvalue()[-2000:]}

    def score(self, code: compiled.Cuda) -> dict[str, dict[str, int]]:
        """What an answer and the solution do to memory on the last case, and the fewest sectors of 32 bytes that hold
        its inputs and outputs."""
        *_, case = self.cases()
        assert isinstance(self.solution, compiled.Cuda)
        outputs = self.drive(self.solution, *case.args, **case.kwargs)
        tensors = [*case.args, *(outputs if isinstance(outputs, tuple) else (outputs,))]
        least = sum(-(-t.numel() * t.element_size() // 32) for t in tensors if isinstance(t, Tensor))
        counted = {
            name: each.counts(lambda each=each: self.drive(each, *case.args, **case.kwargs))  # type: ignore[misc]
            for name, each in (("yours", code), ("solution", self.solution))
        }
        return {**counted, "least": {"sectors": least, "conflicts": 0}}

    def mistake(self, code: Code, first: int) -> str:
        """The usual mistake that gives what this answer gives on the next cases that fail, and is right where it was;
        empty if none does. In CUDA and C++ they are not tried: compiling each takes too long, and the emulator says
        what is wrong."""
        if not isinstance(code, ModuleType):
            return ""
        failing, cases = [], list(self.cases())
        for case in cases[first:]:
            right, theirs = self.expected(case)
            found = self.outcome(code, case)
            if not fits(found, right, theirs, case):
                failing.append((case, found))
            if len(failing) == SEVERAL:
                break
        for name in self.drill.text.mistakes:
            try:
                wrong = load("drill_mistake", self.drill.solution, self.drill.mistaken(name))
                if all(alike(self.outcome(wrong, case), found) for case, found in failing) and all(
                    fits(self.outcome(wrong, case), *self.expected(case), case) for case in cases[:first]
                ):
                    return name
            except Exception:  # a mistake that does not run explains nothing
                continue
        return ""


def call(name: str) -> Callable[..., Any]:
    """Calls the function of this name."""

    def drive(code: Code, *args: Any, **kwargs: Any) -> Any:
        return getattr(code, name)(*args, **kwargs)

    return drive


def failure(error: Exception, path: Path) -> Verdict:
    """What went wrong, with the line of the learner's file if it is theirs."""
    if isinstance(error, Wrong):
        return {"what": error.kind, "details": error.details}
    if isinstance(error, NotImplementedError):
        return {"what": "unwritten", "details": {}}
    line = error.lineno if isinstance(error, SyntaxError) else None
    if isinstance(error, compiled.DoesNotCompile):
        return {"what": "raised", "details": {"error": str(error)}, "line": error.line}
    if isinstance(error, alone.Fault):
        found = re.search(rf"{re.escape(path.name)}:(\d+)", str(error))
        return {"what": "raised", "details": {"error": str(error)[:400]}, "line": int(found[1]) if found else None}
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename) == path:
            line = frame.lineno
    text = " ".join(str(error).split())[:300]
    return {"what": "raised", "details": {"error": f"{type(error).__name__}: {text}" if text else type(error).__name__},
            "line": line}  # fmt: skip


@contextlib.contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """Fills whatever torch.empty gives with NaN, so that what an answer does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def in_float64(value: Any) -> Any:
    """Floating-point tensors in float64, wherever they are."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: in_float64(v) for k, v in value.items()}
    return type(value)(map(in_float64, value)) if isinstance(value, list | tuple) else value


def detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {k: detached(v) for k, v in value.items()}
    return type(value)(map(detached, value)) if isinstance(value, list | tuple) else value


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return not isinstance(a, int | float | str | bool | None) or a == b


def alike(a: Any, b: Any) -> bool:
    """Whether two results are the same but for rounding, NaN equal to NaN."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.allclose(a, b, rtol=16 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0, equal_nan=True)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5) or (math.isnan(a) and math.isnan(b))
    return bool(type(a) is type(b) and a == b)


def kind(value: Any) -> str:
    return type(value).__name__


def fits(found: Any, right: Any, theirs: Any, case: Case) -> bool:
    try:
        compare(found, right, theirs, case)
    except Wrong:
        return False
    return True


def compare(found: Any, right: Any, theirs: Any, case: Case, place: str = "") -> None:
    """Wrong unless the result is right; `theirs` is the solution's in the types of the case."""
    if case.grad and not place:  # the result, then gradients, whose rounding is that of the result at least
        tensor(found[0], right[0], theirs[0], case, "")
        for i, (mine, exact, solved) in enumerate(zip(found[1], right[1], theirs[1], strict=True)):
            tensor(mine, exact, solved, case, f" ∂/∂{i}", floor=float(right[0].abs().max()))
    elif isinstance(theirs, Tensor):
        tensor(found, right, theirs, case, place)
    elif isinstance(theirs, dict):
        if not isinstance(found, dict) or found.keys() != theirs.keys():
            raise Wrong("value", place=place, found=repr(found)[:200], expected=repr(theirs)[:200])
        for key in theirs:
            compare(found[key], right[key], theirs[key], case, f"{place}[{key!r}]")
    elif isinstance(theirs, list | tuple):
        if not isinstance(found, list | tuple):
            raise Wrong("kind", found=kind(found), expected=kind(theirs), place=place)
        if len(found) != len(theirs):
            raise Wrong("length", found=len(found), expected=len(theirs), place=place)
        for i, each in enumerate(theirs):
            compare(found[i], right[i], each, case, f"{place}[{i}]")
    elif isinstance(theirs, float):
        number = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
        if not isinstance(number, int | float):
            raise Wrong("kind", found=kind(found), expected="float", place=place)
        exact = right.item() if isinstance(right, Tensor) else right
        mine, right, theirs = (torch.tensor(x, dtype=torch.float64) for x in (number, exact, theirs))
        tensor(mine, right, theirs, case, place, eps=2**-24)
    elif found != theirs or isinstance(found, Tensor):
        raise Wrong("value", place=place, found=repr(found)[:200], expected=repr(theirs)[:200])


def tensor(
    found: Any, right: Tensor, theirs: Tensor, case: Case, place: str, *, eps: float = 0.0, floor: float = 0.0
) -> None:
    """Wrong unless type, shape and every element are right; `floor`: the largest number counts as this at least."""
    if not isinstance(found, Tensor):
        raise Wrong("kind", found=kind(found), expected="Tensor", place=place)
    if found.shape != theirs.shape:
        raise Wrong("shape", found=[*found.shape], expected=[*theirs.shape], place=place)
    if found.dtype != theirs.dtype:
        raise Wrong("dtype", found=str(found.dtype)[6:], expected=str(theirs.dtype)[6:], place=place)
    if not theirs.is_floating_point():
        bad = found != theirs
        allowed = 0.0
    else:
        mine, exact, solved = (x.detach().double() for x in (found, right, theirs))
        finite = exact.isfinite()
        largest = max(floor, float(exact[finite].abs().max()) if finite.any() else 0.0)
        off = float((solved - exact)[finite].abs().max()) if finite.any() else 0.0
        sides = [side for a in case.args if isinstance(a, Tensor) for side in a.shape]
        length = case.length or max(sides, default=1)
        allowed = max(4 * off, (eps or torch.finfo(theirs.dtype).eps) * (4 + math.sqrt(length)) * largest)
        bad = torch.where(finite, ~((mine - exact).abs() <= allowed), mine != exact)
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise Wrong(
            "nan" if found.is_floating_point() and bool(found[index].isnan()) else "element",
            index=list(index), found=float(found[index]), expected=float(right[index]), allowed=allowed,
            count=int(bad.sum()), of=bad.numel(), place=place,
        )  # fmt: skip


def shown(case: Case, names: list[str]) -> str:
    """The input in one line each, with its name where there is one: values if they are few, shapes otherwise."""
    named = [*zip_longest(names[: len(case.args)], case.args), *case.kwargs.items()]
    return "\n".join(f"{name} = {one(value)}" if name else one(value) for name, value in named)


def one(value: Any) -> str:
    if isinstance(value, Tensor):
        text = " ".join(str(value.detach()).split())
        if value.numel() <= MOST_SHOWN:
            return text
        return f"tensor of shape {[*value.shape]}, {str(value.dtype)[6:]}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
