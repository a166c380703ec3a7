"""What the tests of finetune/distributed run on ranks: functions that another process imports by name."""

import os
import signal
import time

import torch

from finetune.distributed.collectives import MAX
from finetune.distributed.mesh import Layout
from finetune.errors import UserError


def number(rank, add=0):
    print(f"rank {rank.number} of {rank.world}")
    return rank.number + add


def store_port(rank):
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    store.set("who", f"{os.getppid()}")
    return store.get("who")


def refuse(rank):
    raise UserError("6 heads are refused")


def refuse_on_one(rank):
    if rank.number == 1:
        raise UserError("rank 1 alone refuses")
    rank.mesh(Layout(tp=rank.world)).tp.all_reduce(torch.ones(3))


def fail_on_one(rank):
    if rank.number == 1:
        raise ZeroDivisionError("a mistake in the code")
    rank.mesh(Layout(tp=rank.world)).tp.all_reduce(torch.ones(3))


def die_in_a_collective(rank, victim):
    group = rank.mesh(Layout(dp=rank.world)).dp
    group.all_reduce(torch.ones(7, 2))
    if rank.number == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        group.all_reduce(torch.ones(5))


def different_shapes(rank):
    rank.mesh(Layout(tp=rank.world)).tp.all_reduce(torch.ones(4 + rank.number))


def different_order(rank):
    group = rank.mesh(Layout(tp=rank.world)).tp
    x = torch.ones(4)
    calls = [lambda: group.all_reduce(x), lambda: group.all_gather(x)]
    for call in calls if rank.number == 0 else calls[::-1]:
        call()


def other_group(rank):
    """Rank 0 waits in tp for a rank that never comes."""
    mesh = rank.mesh(Layout(tp=rank.world))
    if rank.number == 0:
        mesh.tp.all_reduce(torch.ones(2, 3))
    else:
        time.sleep(60)


def pids(rank):
    return os.getpid()


def sleep(rank, seconds):
    time.sleep(seconds)


def every_collective(rank):
    """The results of each collective on small numbers, and what was counted."""
    mesh = rank.mesh(Layout(tp=rank.world))
    group, r, n = mesh.tp, rank.number, rank.world
    x = torch.arange(2.0 * n).view(2, n) + 10 * r
    found = {
        "sum": group.all_reduce(x.clone()),
        "max": group.all_reduce(x.clone(), MAX),
        "gathered": group.all_gather(x, 1),
        "scattered": group.reduce_scatter(x, 1),
        "sent": group.all_to_all(x.T.contiguous(), [1] * n, [1] * n),
        "from": group.broadcast(x.clone(), n - 1),
    }
    pending = group.send(x, (r + 1) % n, tag=3)
    found["received"] = group.receive(torch.empty_like(x), (r - 1) % n, tag=3)
    pending.wait()
    flat, out = torch.arange(1.0 * n) + r, torch.empty(1)
    works = [group.start_reduce_scatter(out, flat), group.start_all_reduce(y := torch.ones(3) * r)]
    for work in works:
        work.wait()
    found |= {"started scatter": out, "started sum": y}
    return found, dict(mesh.counts.calls), dict(mesh.counts.bytes)


def places(rank, layout):
    mesh = rank.mesh(layout)
    groups = ("tp", "pp", "dp", "cp", "ep", "edp", "dp_cp", "edp_cp", "model", "ends")
    for name in groups:
        group = getattr(mesh, name)
        total = group.all_reduce(torch.tensor([float(rank.number)]))
        assert total.item() == sum(group.ranks)
    return mesh.place, {name: getattr(mesh, name).ranks for name in groups}
