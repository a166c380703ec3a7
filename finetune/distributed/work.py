"""What the ranks of a training are asked to do, as functions for `Ranks.call`: begin, step, loss, save, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.distributed import plan, sharded
from finetune.distributed.launch import Rank
from finetune.distributed.mesh import Layout
from finetune.distributed.model import ParallelModel
from finetune.distributed.schedules import Event
from finetune.distributed.stage import initial


def begin(
    rank: Rank,
    config: plan.Config,
    layout: Layout,
    seed: int,
    optimizer: dict[str, Any],
    announce: bool = False,
    **options: Any,
) -> int:
    """Makes this rank's part of the model and its optimizer; the number of its parameters. options: ParallelModel's.
    announce: prints what this rank has."""
    model = ParallelModel(config, rank.mesh(layout), seed=seed, **options)
    mixture = options.get("mixture")
    model.load(initial(config, seed, mixture.experts if mixture else 0))
    model.make_optimizer(**optimizer)
    rank.kept["model"] = model
    count = sum(p.numel() for _, p, _ in model.named())
    if announce:
        place = " ".join(f"{dim} {model.mesh.place[dim]}" for dim in ("tp", "pp", "dp", "cp"))
        blocks = ", ".join(stage.blocks for stage in model.stages)
        print(f"{place}: blocks {blocks}; {count:,} parameters", flush=True)
    return count


def part(rank: Rank) -> ParallelModel:
    return rank.kept["model"]


def step(rank: Rank, number: int, rows: Tensor, lr: float, clip: float) -> tuple[float, float]:
    """Step `number` of the run, on rows (B, T + 1): loss (nats a token) and norm, on every rank alike."""
    model = part(rank)
    model.mesh.counts.clear()
    loss = model.gradients(rows, number)
    return loss, model.step(lr, clip)


def loss(rank: Rank, rows: Tensor) -> tuple[float, int]:
    """(nats summed over the targets of rows, their number)."""
    return part(rank).loss(rows)


def sent(rank: Rank) -> dict[tuple[str, str], int]:
    """Bytes that this rank sent in the latest step, by kind and group."""
    return dict(part(rank).mesh.counts.bytes)


def trace(rank: Rank) -> tuple[dict[str, int], list[Event], int]:
    """This rank's coordinates, its passes of the latest step, and the micro-batches that it held at once."""
    model = part(rank)
    assert model.played is not None
    return model.mesh.place, model.played.trace, model.played.live


def mixture(rank: Rank) -> tuple[float, int]:
    """(the mean balance loss of this rank's experts in the latest step, choices that found no room)."""
    model = part(rank)
    found = model.mixtures()
    shares = [model.mesh.dp_cp.all_reduce(each.balance.detach().clone()).item() for each in found]
    return sum(shares) / len(shares), sum(each.dropped for each in found)


def save(rank: Rank, folder: Path) -> str:
    return sharded.save(part(rank), folder, rank.number, rank.world)


def load(rank: Rank, folder: Path) -> None:
    sharded.load(part(rank), folder)
