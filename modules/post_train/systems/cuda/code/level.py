"""A level of a ladder: one .cu file, compiled for the emulator by itself (finetune/kernels/alone.py).

A level is standalone: a kernel, and `extern "C" int launch_level(…)` with the arguments that all levels of its topic
share (topics.py). The same file compiles with nvcc.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from finetune.errors import UserError
from finetune.kernels import alone, weave
from finetune.kernels.alone import Kernel
from finetune.kernels.emulator import ROOT

CODE = Path(__file__).parent


@dataclass(frozen=True)
class Level:
    topic: str
    number: int
    path: Path

    @property
    def name(self) -> str:
        """`shared_tile` of level_03_shared_tile.cu."""
        return self.path.stem.split("_", 2)[2]

    @property
    def idea(self) -> str:
        """The first line of the head."""
        return self.path.read_text(encoding="utf-8").splitlines()[0].removeprefix("// ")

    @property
    def faults(self) -> list[str]:
        """The deliberate faults of the level, from the file of the same name next to it."""
        return [fault.name for fault in weave.read(self.path).faults]


def levels(topic: str = "*") -> list[Level]:
    """All levels, or those of one topic, in order."""
    found = sorted(CODE.glob(f"{topic}/level_*.cu"))
    return [Level(path.parent.name, int(path.stem.split("_")[1]), path) for path in found]


def build(level: Level, kind: str) -> Path:
    """The shared object of a level, compiled if it is not there. UserError with the compiler's words."""
    return alone.build(woven(level), kind, f"{level.topic}_{level.path.stem}")


def woven(level: Level) -> Path:
    """The copy of a level that is compiled: with its faults in it, to be switched on at run time."""
    copy = ROOT / "build" / "levels" / "woven" / level.topic / level.path.name
    try:
        with FileLock(copy.parent.with_suffix(".lock")):
            weave.copy(level.path, copy, [edit for fault in weave.read(level.path).faults for edit in fault.edits])
    except weave.BadFault as error:
        raise UserError(str(error)) from None
    return copy


def build_all(chosen: Sequence[Level], kind: str, threads: int) -> None:
    """Builds what is missing, several at a time."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(lambda level: build(level, kind), chosen))


@functools.cache
def load(level: Level, kind: str = "checked") -> Kernel:
    return Kernel(build(level, kind), "launch_level")
