"""The oracle: every parameter's gradient on every layout equals one process's; losses alone hide wrong gradients."""

import functools

import on_ranks
import pytest
import torch
import torch.nn.functional as F
from on_ranks import assembled, batch_of, whole_model

from finetune import optim
from finetune.distributed.mesh import Layout
from finetune.errors import UserError

ONE = Layout()
TWO = [Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(cp=2)]
FOUR = [
    Layout(tp=4), Layout(pp=4), Layout(dp=4), Layout(cp=4), Layout(tp=2, pp=2), Layout(tp=2, dp=2), Layout(pp=2, dp=2),
    Layout(tp=2, cp=2), Layout(pp=2, cp=2), Layout(dp=2, cp=2),
]  # fmt: skip


def alone(name, rows):
    """Loss, norm and gradients of plain code in this process."""
    return once(name, tuple(map(tuple, rows.tolist())))


@functools.cache
def once(name, rows):
    rows, model = torch.tensor(rows), whole_model(name)
    logits = model(rows[:, :-1].clamp(min=0)).double()
    targets = rows[:, 1:].flatten()
    loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    (loss / max(int((targets != -100).sum()), 1)).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([g.double().norm() for g in grads.values()]).norm()
    return loss.item() / max(int((targets != -100).sum()), 1), norm.item(), grads


def agree(ranks, name, layout, rows, **options):
    answers = ranks.call(on_ranks.gradients, name, layout, rows, **options)
    loss, norm, grads = alone(name, rows)
    whole = assembled(piece for answer in answers for piece in answer[2])
    assert whole.keys() == grads.keys()
    for key, expected in grads.items():
        torch.testing.assert_close(whole[key], expected, rtol=2e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
    for answer in answers:
        assert answer[0] == pytest.approx(loss, rel=1e-5)
        assert answer[1] == pytest.approx(norm, rel=1e-5)
    assert len({answer[1] for answer in answers}) == 1, "every rank clips by the same norm"
    return answers


@pytest.mark.parametrize("name", ["gpt", pytest.param("llama", marks=pytest.mark.long)])
def test_gradients_on_two_ranks(two, name):
    for layout in TWO:
        agree(two, name, layout, batch_of(), micro=3)
    agree(two, name, Layout(tp=2), batch_of(), sequence=True)
    agree(two, name, Layout(pp=2), batch_of(rows=8), micro=4, schedule="interleaved", chunks=2)
    agree(two, name, Layout(pp=2), batch_of(), micro=5, schedule="gpipe")
    agree(two, name, Layout(dp=2), batch_of(), sharded=True, bucket=4000)


@pytest.mark.parametrize(
    "name", ["gpt", "untied", *(pytest.param(n, marks=pytest.mark.long) for n in ("llama", "capped"))]
)
def test_gradients_on_four_ranks(four, name):
    for layout in FOUR:
        if (name, layout.tp) != ("untied", 4):  # its 3 key–value heads are too few
            agree(four, name, layout, batch_of(), micro=2)
    agree(four, name, Layout(tp=2, pp=2), batch_of(), micro=3, sequence=True)
    agree(four, name, Layout(tp=2, cp=2), batch_of(), sequence=True, sharded=True, bucket=3000)
    agree(four, name, Layout(tp=2, dp=2), batch_of(), micro=2, sequence=True, sharded=True, bucket=3000)
    agree(four, name, Layout(pp=2, dp=2), batch_of(), micro=4, schedule="interleaved", chunks=2, sharded=True)


def trained_alone(name, steps):
    model = whole_model(name)
    optimizer = optim.AdamW(optim.decay_groups(model.parameters(), 0.1))
    losses = []
    for step in range(steps):
        rows = batch_of(rows=6, seed=step)
        logits = model(rows[:, :-1].clamp(min=0))
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step(lr=1e-2, grad_scale=min(1.0, 0.5 / (norm.item() + 1e-6)))
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


def test_training_equals_one_process(four):
    """Clipped steps with a sharded optimizer, whose shards cut through parameters, and without."""
    losses, weights = trained_alone("gpt", 5)
    for layout, options in (
        (Layout(tp=2, dp=2), {"sharded": True, "bucket": 3000, "micro": 2}),
        (Layout(dp=4), {"sharded": True}),
        (Layout(pp=2, dp=2), {"sharded": True, "micro": 3}),
        (Layout(tp=2, pp=2), {"micro": 2, "sequence": True}),
    ):
        answers = four.call(on_ranks.trained, "gpt", layout, 5, **options)
        for answer in answers:
            assert answer[0] == pytest.approx(losses, rel=1e-4)
        whole = assembled(piece for answer in answers for piece in answer[1])
        for key, expected in weights.items():
            if key.endswith("qkv.bias"):  # a bias of the keys has the gradient 0, of which AdamW makes noise
                whole[key][24:48] = expected[24:48]
            torch.testing.assert_close(whole[key], expected, rtol=1e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


def test_unequal_rows_ranks_and_windows(four):
    """One row over four ranks, ranks without a counted token, a window shorter than the text."""
    nothing = batch_of(rows=4)
    nothing[2:, 1:] = -100
    agree(four, "gpt", Layout(dp=4), batch_of(rows=1, ignored=0), micro=2)
    agree(four, "gpt", Layout(dp=2, tp=2), nothing)
    agree(four, "gpt", Layout(dp=2, pp=2), batch_of(rows=3, length=7, ignored=0), micro=2)
    agree(four, "gpt", Layout(tp=2, cp=2), batch_of(rows=3, length=12, ignored=0), micro=2)
    every = torch.full((4, 17), -100)
    for loss, norm, *_ in four.call(on_ranks.gradients, "gpt", Layout(dp=2, pp=2), every, micro=2):
        assert loss == norm == 0


def test_held_out_loss_on_every_layout(four):
    rows = batch_of()
    loss, _, _ = alone("llama", rows)
    for layout in (Layout(tp=2, pp=2), Layout(dp=2, pp=2), Layout(cp=4)):
        for total, count in four.call(on_ranks.evaluated, "llama", layout, rows):
            assert count == int((rows[:, 1:] != -100).sum())
            assert total / count == pytest.approx(loss, rel=1e-5)


def test_initial_weights_do_not_depend_on_the_layout(two, four):
    one = assembled(piece for answer in two.call(on_ranks.drawn, "untied", Layout(dp=2)) for piece in answer)
    for layout in (Layout(pp=4), Layout(tp=2, pp=2)):
        other = assembled(piece for answer in four.call(on_ranks.drawn, "untied", layout) for piece in answer)
        assert all(torch.equal(one[name], other[name]) for name in one | other)
    spread = {name: w.std().item() for name, w in one.items() if w.dim() == 2}
    assert spread["blocks.0.mlp.up.weight"] == pytest.approx(0.02, rel=0.1)
    assert spread["blocks.3.mlp.down.weight"] == pytest.approx(0.02 / 8**0.5, rel=0.1)
    assert (one["norm.weight"] == 1).all()
    assert not one["blocks.0.attn.q.bias"].any()


@pytest.mark.parametrize(
    ("changes", "layout", "options", "said"),
    [
        ({"heads": 1}, Layout(tp=2), {}, r"tp 2 is too large: there are 1 key–value heads"),
        ({"vocab_size": 1}, Layout(tp=2), {}, r"tp 2 is too large: there are 1 tokens"),
        ({"layers": 1}, Layout(pp=2), {}, r"2 pipeline stages are too many: the model has 1 layers"),
        ({}, Layout(cp=2), {"length": 14}, r"cp 2 needs a length that 4 divides, not 14"),
        ({}, Layout(tp=2), {"length": 15, "sequence": True}, r"length that tp 2 · cp 1 divides, not 15"),
        ({}, Layout(pp=2), {"schedule": "interleaved", "chunks": 2, "micro": 3}, "2 stages do not divide 3 micro"),
        ({}, Layout(tp=4), {}, "tp 4 needs 4 processes, there are 2"),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line(two, changes, layout, options, said):
    with pytest.raises(UserError, match=said) as e:
        two.call(on_ranks.refused, changes, layout, **options)
    assert "\n" not in str(e.value)


def test_live_micro_batches(two):
    """Stage s of p holds p − s micro-batches with 1F1B, all of them with GPipe."""
    rows = batch_of(rows=10, ignored=0)
    for schedule, expected in (("1f1b", [2, 1]), ("gpipe", [5, 5])):
        answers = two.call(on_ranks.gradients, "gpt", Layout(pp=2), rows, micro=5, schedule=schedule)
        assert [answer[3] for answer in answers] == expected


def test_collectives_of_a_step_against_the_formulas(two):
    rows, width, layers, fp32 = batch_of(rows=4, ignored=0), 24, 4, 4
    tokens = 4 * 16
    parameters = sum(p.numel() for p in whole_model("gpt").parameters())
    activation = tokens * width * fp32
    # Tensor parallel: two all-reduces a layer in each direction, one behind the embedding and one before the head;
    # three of a number a token for the loss. (The loss itself and the batch are summed once over groups of one rank.)
    for calls, sent, _, _ in two.call(on_ranks.counted, "gpt", Layout(tp=2), rows):
        assert calls == {("all_reduce", "tp"): 4 * layers + 2 + 3}
        assert sent["all_reduce", "tp"] == (4 * layers + 2) * activation + 3 * tokens * fp32  # 2 (n − 1)/n = 1
    # With sequence parallelism as many bytes; the gradients of norms, positions and row biases are summed once more.
    partial = (2 * layers + 1) * 2 * width + 16 * width + 2 * layers * width
    for calls, sent, _, _ in two.call(on_ranks.counted, "gpt", Layout(tp=2), rows, sequence=True):
        half = (2 * layers + 1) * activation  # (n − 1)/n of the whole, forward; as much backward
        assert calls["all_gather", "tp"] == calls["reduce_scatter", "tp"] == 4 * layers + 2
        assert sent["all_gather", "tp"] == sent["reduce_scatter", "tp"] == half
        assert sent["all_reduce", "tp"] == 3 * tokens * fp32 + partial * fp32
    # Data parallel: 2 (n − 1)/n of the parameters, most of it before the backward pass ends.
    for calls, sent, early, buckets in two.call(on_ranks.counted, "gpt", Layout(dp=2), rows, bucket=8000):
        assert sent["all_reduce", "dp_cp"] == parameters * fp32 + 8
        assert calls["all_reduce", "dp_cp"] == sum(buckets) + 1
        assert early == buckets, "every bucket started as soon as its gradients were there"
    # A distributed optimizer scatters the gradients: half of that, and gathers the parameters later.
    for _, sent, _, _ in two.call(on_ranks.counted, "gpt", Layout(dp=2), rows, sharded=True):
        assert sent["reduce_scatter", "dp_cp"] == parameters * fp32 // 2
    # Pipeline: one activation a micro-batch to the next stage, one gradient back; the tied embedding once.
    for calls, sent, _, _ in two.call(on_ranks.counted, "gpt", Layout(pp=2), rows, micro=4):
        assert calls["send", "pp"] == 4
        assert sent["send", "pp"] == activation
        assert sent["all_reduce", "ends"] == 37 * width * fp32
    # Ring attention: keys and values once forward, and backward once more, their gradients twice.
    for calls, sent, _, _ in two.call(on_ranks.counted, "gpt", Layout(cp=2), rows):
        assert calls["send", "cp"] == layers * (1 + 1 + 2)
        assert sent["send", "cp"] == layers * 4 * activation  # 2 tensors of half a row
