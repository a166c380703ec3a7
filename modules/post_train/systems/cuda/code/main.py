"""The ladder: five problems, each solved by kernels that differ in one idea from the one before.

Every level is a .cu file that nvcc compiles too. Here the emulator runs it on the CPU, compares it with float64 and
counts what it does to memory. No time is measured: an emulator has none that means anything for a GPU.
"""

from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import UserError
from finetune.runs import config
from finetune.runs.machine import physical_cores
from finetune.runs.run import Run

from . import plots
from .level import Level, build_all, levels, load
from .measure import Count, lines, measure
from .topics import ODD, SIZES, TOPICS

__all__ = ["ODD", "SIZES", "TOPICS", "Config", "Count", "Level", "build_all", "climb", "levels", "lines", "load"]
__all__ += ["main", "measure", "page_table", "table"]


@dataclass
class Config(config.Config):
    steps: int = 7  # levels of each topic to climb; 7 are all
    topics: str = ",".join(TOPICS)  # which, separated by commas
    size: Literal["small", "large"] = "large"  # of the problems

    @classmethod
    def toy(cls) -> "Config":
        return cls(size="small")

    def __post_init__(self) -> None:
        super().__post_init__()
        for topic in self.topics.split(","):
            if topic not in TOPICS:
                raise UserError(f"--topics: '{topic}' is not one of {', '.join(TOPICS)}")


def climb(topic: str, size: str = "small") -> list[Count]:
    """All levels of a topic, in order."""
    problem = TOPICS[topic](*SIZES[size][topic])
    return [measure(level, problem) for level in levels(topic)]


def main(cfg: Config, run: Run) -> dict[str, Any]:
    topics = cfg.topics.split(",")
    chosen = {topic: [level for level in levels(topic) if level.number <= cfg.steps] for topic in topics}
    run.print("compiling the levels for the emulator …")
    build_all([level for part in chosen.values() for level in part], "checked", cfg.threads or physical_cores())
    found: dict[str, list[Count]] = {}
    for topic, part in chosen.items():
        sizes = SIZES[cfg.size][topic]
        problem = TOPICS[topic](*sizes, seed=cfg.seed)
        rows: dict[str, Any] = {}
        for step in run.steps(len(part), {"rows": rows}, phase=topic):
            count = measure(part[step], problem)
            rows[str(step)] = count.to_dict()
            run.log(step, sectors=count.sectors, wavefronts=count.wavefronts, requests=count.requests)
        found[topic] = [Count(**rows[str(i)]) for i in range(len(part))]
        if found[topic]:
            run.table(f"{topic} {' × '.join(map(str, sizes))}", table(found[topic]))
    judge(run, found)
    plots.roofline(run, found)
    plots.bars(run, found)
    return {}


def table(counts: list[Count]) -> list[dict[str, str]]:
    """Rows for people: what each level does, compared with the level before it."""
    rows = []
    for i, c in enumerate(counts):
        before = counts[i - 1] if i else c
        rows.append(
            {
                "level": f"{c.level} {c.name}",
                "requests": with_gain(before.requests, c.requests),
                "sectors": with_gain(before.sectors, c.sectors),
                "FLOP/byte": f"{c.intensity:.2f}",
                "wavefronts": with_gain(before.wavefronts, c.wavefronts),
                "conflicts": f"{c.excess:,}",
                "blocks": with_gain(before.blocks, c.blocks),
                "instructions": instructions(c),
            }
        )
    return rows


def page_table(topic: str, counts: list[Count]) -> str:
    """The same for the README, with each level's idea."""
    lines = [
        "| level | idea | requests | sectors | wavefronts | conflicts | blocks |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for level, row in zip(levels(topic), table(counts), strict=True):
        link = f"[{row['level']}](code/{topic}/{level.path.name})"
        cells = [
            link,
            level.idea,
            *(row[name] for name in ("requests", "sectors", "wavefronts", "conflicts", "blocks")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_gain(before: int, now: int) -> str:
    """`now`, and how many times fewer (÷) or more (×) than before."""
    if before == now or not before or not now:
        return f"{now:,}"
    return f"{now:,} ({f'÷ {before / now:.3g}' if now < before else f'× {now / before:.3g}'})"


def instructions(c: Count) -> str:
    names = ("atomics", "mma", "wgmma", "ldmatrix", "cp_async", "shuffles", "barriers")
    return ", ".join(f"{name.replace('_', '.')} {getattr(c, name):,}" for name in names if getattr(c, name)) or "–"


# --- What a level must be worth


def judge(run: Run, found: dict[str, list[Count]]) -> None:
    """A result for each topic: what its ladder is about. A ladder that was not climbed has gained nothing."""
    by_name = {(topic, c.name): c for topic, counts in found.items() for c in counts}
    gains = {topic: counts[0].sectors / counts[-1].sectors if counts else 1.0 for topic, counts in found.items()}
    if (c := by_name.get(("transpose", "padded"))) and (before := by_name.get(("transpose", "shared_tile"))):
        run.result("transpose_padded_conflicts", c.excess, baseline=before.excess, target=0, higher=False)
    if (c := by_name.get(("reduction", "grid_stride"))) and (before := by_name.get(("reduction", "atomics"))):
        run.result("reduction_atomics", c.atomics, baseline=before.atomics, target=0, higher=False)
    if (c := by_name.get(("softmax", "registers"))) and (before := by_name.get(("softmax", "three_passes"))):
        least = c.least_bytes
        run.result("softmax_bytes_over_least", c.bytes / least, baseline=before.bytes / least, target=1.0, higher=False)
    for topic, target in (("matmul", 20.0), ("attention", 20.0)):
        if topic in gains:
            run.result(f"{topic}_fewer_sectors", gains[topic], baseline=1.0, target=target)
    for topic, target in (("transpose", 4.0), ("softmax", 10.0)):
        if topic in gains:
            run.check(f"{topic}_fewer_sectors", gains[topic], at_least=target)
    for topic, name in (("transpose", "swizzled"), ("matmul", "mma"), ("attention", "flash_mma")):
        if c := by_name.get((topic, name)):
            run.check(f"{topic}_{name}_conflicts", c.excess, at_most=0)
    for topic, counts in found.items():
        if counts:
            run.check(f"{topic}_sectors", counts[-1].sectors)
