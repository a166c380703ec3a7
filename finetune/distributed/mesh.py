"""The rank mesh: which ranks split a layer (tp), the layers (pp), the batch (dp), the text (cp), the experts (ep)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from finetune.distributed.collectives import Counts, Group, Trail
from finetune.errors import UserError

# From ranks that lie far apart to neighbors, as in Megatron-LM: tensor parallelism talks most, pipelines least.
# `edp` × `ep` = dp: the ranks of one `ep` group hold different experts, those of one `edp` group the same ones.
DIMS = ("pp", "edp", "ep", "cp", "tp")
# Groups over several dimensions: name → the dimensions that they join.
JOINED = {"dp": ("edp", "ep"), "dp_cp": ("edp", "ep", "cp"), "edp_cp": ("edp", "cp"), "model": ("pp", "tp")}


@dataclass(frozen=True)
class Layout:
    """How many ranks each kind of parallelism has. tp · pp · dp · cp processes; ep divides dp."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"{field.name} must be at least 1, not {getattr(self, field.name)}")
        if self.dp % self.ep:
            raise UserError(f"ep {self.ep} does not divide dp {self.dp}: experts are spread over the ranks of dp")

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of DIMS."""
        return self.pp, self.dp // self.ep, self.ep, self.cp, self.tp

    def __str__(self) -> str:
        """Such as `tp 2 · dp 4`: the kinds with more than one rank."""
        sizes = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return " · ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one process"

    def place(self, rank: int) -> dict[str, int]:
        """The coordinates of a rank, by the names in DIMS and `dp`."""
        where = {}
        for name, size in zip(reversed(DIMS), reversed(self.shape), strict=True):
            rank, where[name] = divmod(rank, size)
        return where | {"dp": where["edp"] * self.ep + where["ep"]}

    def groups(self, *joined: str) -> list[list[int]]:
        """The ranks of every group over the dimensions `joined`, in the order of their first ranks."""
        others = [range(size) if name not in joined else [0] for name, size in zip(DIMS, self.shape, strict=True)]
        own = [range(size) if name in joined else [0] for name, size in zip(DIMS, self.shape, strict=True)]
        return [[self.rank(map(sum, zip(a, b, strict=True))) for b in product(*own)] for a in product(*others)]

    def rank(self, coordinates) -> int:
        """The rank at coordinates in the order of DIMS."""
        number = 0
        for at, size in zip(coordinates, self.shape, strict=True):
            number = number * size + at
        return number


class Mesh:
    """The groups that this rank is in: attributes tp, pp, dp, cp, ep, edp, dp_cp, edp_cp, model, ends.

    model: the ranks that together hold the parameters once. ends: first and last pipeline stage, which share a tied
    embedding; a group of one for the stages between. Every rank must make the same meshes in the same order: a process
    group is made by all.
    """

    def __init__(self, layout: Layout, trail: Trail | None = None, device: str = "cpu") -> None:
        if layout.world != dist.get_world_size():
            raise UserError(f"{layout} needs {layout.world} processes, there are {dist.get_world_size()}")
        self.layout, self.counts = layout, Counts()
        self.rank = dist.get_rank()
        self.place = layout.place(self.rank)
        self.device = torch.device(device)
        trail = trail or Trail()
        mesh = init_device_mesh(device, layout.shape, mesh_dim_names=DIMS)
        for name in DIMS:
            group = mesh.get_group(name) if mesh[name].size() > 1 else None
            self.add(name, dist.get_process_group_ranks(group) if group else [dist.get_rank()], group, trail)
        ends = [[line[0], line[-1]] if len(line) > 1 else line for line in layout.groups("pp")]
        for name, lists in [(name, layout.groups(*dims)) for name, dims in JOINED.items()] + [("ends", ends)]:
            mine, group = [dist.get_rank()], None
            for ranks in lists:
                made = dist.new_group(ranks) if len(ranks) > 1 else None
                if dist.get_rank() in ranks:
                    mine, group = ranks, made
            self.add(name, mine, group, trail)

    tp: Group
    pp: Group
    dp: Group
    cp: Group
    ep: Group
    edp: Group
    dp_cp: Group
    edp_cp: Group
    model: Group
    ends: Group

    def add(self, name: str, ranks: list[int], group: dist.ProcessGroup | None, trail: Trail) -> None:
        setattr(self, name, Group(name, ranks, group, self.counts, trail))


def share(count: int, parts: int, part: int) -> tuple[int, int]:
    """The range (start, stop) of `part` when `count` things are shared out evenly; the first parts get what is left."""
    each, left = divmod(count, parts)
    start = part * each + min(part, left)
    return start, start + each + (part < left)


def sizes(count: int, parts: int) -> list[int]:
    """How many things each part gets."""
    return [stop - start for start, stop in (share(count, parts, part) for part in range(parts))]
