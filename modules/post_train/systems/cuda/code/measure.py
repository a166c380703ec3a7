"""What a level does to memory, counted by the emulator's checked build: requests, sectors, wavefronts, instructions."""

from dataclasses import asdict, dataclass
from typing import Any

from finetune.kernels.alone import GLOBAL, SECTOR, SHARED

from .level import Level, load
from .topics import Problem


@dataclass(frozen=True)
class Count:
    """One level on one problem. A request is one memory instruction of one warp.

    sectors      32-byte pieces of global memory that the requests touch. Times 32 this is the traffic if no cache ever
                 helped: the model of DRAM used here.
    wavefronts   rounds in which shared memory serves the requests; `ideal` without any bank conflict. What wgmma reads
                 there itself is no request.
    blocks       of the largest grid: how many multiprocessors have work.
    """

    level: int
    name: str
    error: float  # the largest, against float64
    flops: int
    least_bytes: int
    requests: int
    sectors: int
    wavefronts: int
    ideal: int
    atomics: int
    mma: int
    wgmma: int
    ldmatrix: int
    cp_async: int
    shuffles: int
    barriers: int
    blocks: int

    @property
    def bytes(self) -> int:
        return SECTOR * self.sectors

    @property
    def excess(self) -> int:
        """Wavefronts lost to bank conflicts."""
        return self.wavefronts - self.ideal

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(level: Level, problem: Problem) -> Count:
    """Runs a level in the checked build, compares it with float64 and counts. Raises if it is wrong in any way."""
    kernel = load(level, "checked")
    kernel.controls.set_counting(True)
    kernel.controls.take_largest_grid()
    result = problem.run(kernel)
    rows, blocks = kernel.controls.statistics(), kernel.controls.take_largest_grid()
    kernel.controls.set_counting(False)

    def total(field: str, *kinds: str) -> int:
        return sum(row[field] for row in rows if row["kind"] in kinds)

    return Count(
        level=level.number,
        name=level.name,
        error=problem.check(result),
        flops=problem.flops,
        least_bytes=problem.least_bytes,
        requests=total("requests", *GLOBAL),
        sectors=total("units", *GLOBAL),
        wavefronts=total("units", *SHARED),
        ideal=total("ideal", *SHARED),
        atomics=total("requests", "global atomic"),
        mma=total("requests", "mma"),
        wgmma=total("requests", "wgmma"),
        ldmatrix=total("requests", "ldmatrix"),
        cp_async=total("requests", "cp.async to shared"),
        shuffles=total("requests", "shuffle"),
        barriers=total("requests", "__syncthreads"),
        blocks=blocks,
    )


def lines(level: Level, problem: Problem) -> list[dict[str, Any]]:
    """The same by source line: rows as of finetune.kernels.emulator.trace."""
    kernel = load(level, "checked")
    kernel.controls.set_counting(True)
    problem.run(kernel)
    rows = [row for row in kernel.controls.statistics() if row["file"].endswith(".cu")]
    kernel.controls.set_counting(False)
    source = level.path.read_text(encoding="utf-8").splitlines()
    return [{**row, "source": source[row["line"] - 1].strip()} for row in sorted(rows, key=lambda row: row["line"])]
