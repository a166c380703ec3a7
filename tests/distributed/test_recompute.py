"""Random streams by rank, dropout that no layout of tp changes, and recomputation that changes no gradient."""

import on_ranks
import pytest
import torch
from on_ranks import batch_of, whole_model

from finetune.distributed import random
from finetune.distributed.mesh import Layout
from finetune.distributed.random import Streams


def test_the_table_of_streams():
    """Ranks that differ in tp alone share the stream `whole`; no two ranks share `split`."""
    layout = Layout(tp=2, pp=2, dp=2, cp=2)
    table = [random.seeds(layout, rank, 7) for rank in range(layout.world)]
    for a in range(layout.world):
        for b in range(a):
            one, other = layout.place(a), layout.place(b)
            apart = {dim for dim in ("pp", "dp", "cp", "tp") if one[dim] != other[dim]}
            assert (table[a]["whole"] == table[b]["whole"]) == (apart == {"tp"})
            assert table[a]["split"] != table[b]["split"]
    assert not {t["whole"] for t in table} & {t["split"] for t in table}
    assert random.seeds(layout, 0, 7) == table[0] != random.seeds(layout, 0, 8)


def test_masks_of_two_ranks(two):
    (one, *more), (other, *_) = two.call(on_ranks.masks, Layout(tp=2))
    assert torch.equal(one["whole"], other["whole"])
    assert not torch.equal(one["split"], other["split"])
    assert (one["split"] == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert one["split"].unique().tolist() == pytest.approx([0, 4 / 3])
    second, third, fourth = more
    assert torch.equal(second, one["whole"]), "a function of (seed, step)"
    assert torch.equal(second, third), "drawn again"
    assert not torch.equal(second, fourth), "and the stream goes on where it was"
    before = torch.random.get_rng_state()
    Streams(Layout(), 0, 1).dropout(torch.ones(5), 0.5, "whole")
    assert torch.equal(before, torch.random.get_rng_state())


def pieces(answers):
    return {(name, piece.dim, piece.ranges): grad for answer in answers for name, piece, grad in answer[1]}


def test_dropout_of_tensor_parallel_ranks_is_that_of_one(two):
    """What every rank has whole is dropped alike on both: loss and gradients of one process with the same stream."""
    rows = batch_of(rows=4, ignored=0)
    model, streams = whole_model("gpt"), Streams(Layout(), 0, 11)
    streams.restart(4)
    plain = loss_of(model, rows).item()
    for block in model.blocks:
        for region in (block.attn, block.mlp):
            region.register_forward_hook(lambda _, inputs, y: streams.dropout(y, 0.3, "whole"))
    loss = loss_of(model, rows)
    loss.backward()
    assert abs(loss.item() - plain) > 1e-3
    whole = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for found, grads, _, (total, count) in two.call(on_ranks.dropped, Layout(tp=2), rows):
        assert found == pytest.approx(loss.item(), rel=1e-5)
        assert total / count == pytest.approx(plain, rel=1e-5), "no dropout without gradients"
        for name, piece, grad in grads:
            piece.put(whole[name], grad)
    for name, p in model.named_parameters():
        torch.testing.assert_close(whole[name], p.grad, rtol=2e-4, atol=2e-6)


def loss_of(model, rows):
    logits = model(rows[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (Layout(tp=2), {}), (Layout(tp=2), {"sequence": True}), (Layout(cp=2), {}),
        (Layout(pp=2), {"micro": 4, "schedule": "interleaved", "chunks": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_recomputation_changes_no_gradient(two, layout, options):
    """With dropout, whose masks must be drawn again, and 1F1B's other passes in between."""
    rows = batch_of(rows=4, ignored=0)
    kept = two.call(on_ranks.dropped, layout, rows, **options)
    for how in ("selective", "block"):
        again = two.call(on_ranks.dropped, layout, rows, recompute=how, **options)
        assert [a[0] for a in again] == [k[0] for k in kept]
        mine, theirs = pieces(again), pieces(kept)
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert torch.equal(mine[key], theirs[key]), (how, key)


def test_bytes_that_selective_recomputation_does_not_keep(two):
    """Two norms (b, t, C) and one activation (b, t, F / tp) a layer, fp32."""
    rows = batch_of(rows=4, ignored=0)
    tokens, width, layers = 4 * 16, 24, 4
    for layout, sequence in ((Layout(tp=2), False), (Layout(dp=2), False), (Layout(tp=2), True)):
        each = tokens // layout.dp
        norms = each // 2 if sequence else each
        expected = layers * 4 * (2 * norms * width + each * 4 * width // layout.tp)
        for answer in two.call(on_ranks.dropped, layout, rows, recompute="selective", sequence=sequence):
            assert answer[2] == expected
