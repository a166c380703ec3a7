"""Collectives against their definitions, their counted bytes against the formulas, and the mesh against Megatron's."""

import functools
import operator

import on_ranks
import pytest
import torch

from finetune.distributed.collectives import wire
from finetune.distributed.mesh import Layout, share, sizes
from finetune.errors import UserError


def test_every_collective(four):
    answers = four.call(on_ranks.every_collective)
    n = 4
    x = [torch.arange(2.0 * n).view(2, n) + 10 * r for r in range(n)]
    for r, (found, calls, counted) in enumerate(answers):
        assert torch.equal(found["sum"], sum(x))
        assert torch.equal(found["max"], x[-1])
        assert torch.equal(found["gathered"], torch.cat(x, 1))
        assert torch.equal(found["scattered"], sum(x)[:, r : r + 1])
        assert torch.equal(found["sent"], torch.stack([y[:, r] for y in x]))
        assert torch.equal(found["from"], x[-1])
        assert torch.equal(found["received"], x[(r - 1) % n])
        assert found["started scatter"].tolist() == [4.0 * r + 6]
        assert found["started sum"].tolist() == [6.0] * 3
        assert calls["all_reduce", "tp"] == 3
        assert calls["send", "tp"] == 1
        size = 2 * n * 4  # bytes of x
        assert counted["all_reduce", "tp"] == 2 * (2 * size * 3 // 4) + 2 * (12 * 3 // 4)
        assert counted["all_gather", "tp"] == size * n * 3 // 4
        assert counted["reduce_scatter", "tp"] == size * 3 // 4 + 16 * 3 // 4
        assert counted["send", "tp"] == size


def test_bytes_of_a_ring():
    assert wire("all_reduce", 4, 400) == 600
    assert wire("all_reduce", 4, 400) == wire("reduce_scatter", 4, 400) + wire("all_gather", 4, 400)
    assert wire("send", 2, 400) == 400


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(dp=4, ep=2), Layout(tp=2, cp=2), Layout(pp=4)], ids=str)
def test_ranks_of_a_mesh(four, layout):
    answers = four.call(on_ranks.places, layout)
    for rank, (place, groups) in enumerate(answers):
        assert place == layout.place(rank)
        assert all(rank in ranks for ranks in groups.values())
        assert len(groups["tp"]) == layout.tp
        assert len(groups["dp_cp"]) == layout.dp * layout.cp
        assert groups["ends"] == (groups["pp"] if layout.pp == 2 else groups["ends"])
    if layout.pp == 4:
        assert [groups["ends"] for _, groups in answers] == [[0, 3], [1], [2], [0, 3]]


def test_neighbors_share_a_layer():
    """Megatron's order: tp fastest, then cp, dp, pp."""
    layout = Layout(tp=2, pp=2, dp=2, cp=2)
    assert layout.groups("tp")[0] == [0, 1]
    assert layout.groups("cp")[0] == [0, 2]
    assert layout.groups("edp", "ep")[0] == [0, 4]
    assert layout.groups("pp")[0] == [0, 8]
    assert sorted(functools.reduce(operator.iadd, layout.groups("pp", "tp"), [])) == list(range(16))


def test_shares():
    assert sizes(257, 4) == [65, 64, 64, 64]
    assert sizes(6, 4) == [2, 2, 1, 1]
    assert sizes(2, 3) == [1, 1, 0]
    assert [share(257, 4, r) for r in range(4)] == [(0, 65), (65, 129), (129, 193), (193, 257)]


def test_impossible_layouts_are_refused():
    with pytest.raises(UserError, match="ep 3 does not divide dp 4"):
        Layout(dp=4, ep=3)
    with pytest.raises(UserError, match="tp must be at least 1, not 0"):
        Layout(tp=0)
