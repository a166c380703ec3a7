"""Checkpoints written by any layout are read by any other, go on as if nothing had been, and open in transformers."""

import shutil

import on_ranks
import pytest
import torch
from on_ranks import batch_of, config_of

from finetune.distributed.mesh import Layout
from finetune.distributed.sharded import Reader
from finetune.distributed.sharded import whole_model as joined
from finetune.errors import UserError
from finetune.lm.io import save

FOUR = [
    (Layout(tp=2, pp=2), {"micro": 2}),
    (Layout(tp=2, dp=2), {"sharded": True, "bucket": 3000}),  # 37 tokens, heads and buckets do not divide
    (Layout(pp=2, dp=2), {"sharded": True, "micro": 2, "schedule": "interleaved", "chunks": 2}),
    (Layout(tp=4), {}),
]
TWO = [(Layout(tp=2), {"sequence": True}), (Layout(dp=2), {"sharded": True}), (Layout(cp=2), {})]


@pytest.fixture(scope="module")
def written(four, tmp_path_factory):
    """By writer: the folder, and the losses of the steps after it."""
    found = []
    for layout, options in FOUR:
        folder = tmp_path_factory.mktemp("checkpoint")
        found.append((folder, four.call(on_ranks.saved, "gpt", layout, folder, **options)[0]))
    return found


def test_any_layout_reads_any_other(two, four, written):
    for number, (folder, losses) in enumerate(written):
        ranks, readers = (two, TWO) if number % 2 else (four, FOUR[number:] + FOUR[:1])
        for layout, options in readers:
            for found in ranks.call(on_ranks.resumed, "gpt", layout, folder, **options):
                assert found == pytest.approx(losses, rel=2e-5), (FOUR[number], layout)


def test_one_process_has_the_same_logits(four, tmp_path):
    """tp 2 pp 2 → one process."""
    four.call(on_ranks.saved, "untied", Layout(tp=2, pp=2), tmp_path)
    rows = batch_of(rows=6, seed=2)
    model = joined(tmp_path, config_of("untied"))
    (loss, count), *_ = four.call(on_ranks.loss_of_checkpoint, "untied", Layout(tp=2, pp=2), tmp_path, rows)
    logits = model(rows[:, :-1].clamp(min=0)).flatten(0, 1)
    targets = rows[:, 1:].flatten()
    assert loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item(), rel=1e-5
    )
    assert count == int((targets != -100).sum())


@pytest.mark.peer
def test_transformers_opens_what_four_ranks_trained(written, tmp_path):
    from transformers import AutoModelForCausalLM

    model = joined(written[0][0], config_of("gpt"))
    save.model(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens = batch_of(ignored=0)[:, :-1]
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_incomplete_and_damaged_checkpoints_are_refused(written, tmp_path):
    source = written[1][0]
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "shard_00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"is incomplete: 3 files, written by \[4\] ranks"):
        Reader(copy)
    (copy / "shard_00003.safetensors").write_bytes((source / "shard_00002.safetensors").read_bytes())
    reader = Reader(copy)
    with pytest.raises(UserError, match=r"is incomplete, \d+ of \d+ elements are there"):
        [reader.tensor(*key) for key in reader.found]
    (copy / "shard_00003.safetensors").write_bytes(b"truncated")
    with pytest.raises(UserError, match=r"shard_00003.safetensors is damaged"):
        Reader(copy)
    with pytest.raises(UserError, match="it is no sharded checkpoint"):
        Reader(tmp_path)
    config = config_of("gpt")
    config.vocab_size = 36
    with pytest.raises(UserError, match=r"embed.weight has the shape \[37, 24\], not \[36, 24\]"):
        joined(source, config)


@pytest.mark.parametrize("name", ["gpt", "untied"])
def test_bytes_of_a_step_equal_the_formulas(four, name):
    rows = batch_of(rows=5)
    layouts = [
        (Layout(tp=2, pp=2), {"micro": 3}), (Layout(tp=2, pp=2), {"sequence": True}), (Layout(tp=2, cp=2), {}),
        (Layout(dp=2, pp=2), {"micro": 2}), (Layout(tp=2, dp=2), {"sharded": True, "sequence": True}),
        (Layout(pp=2, cp=2), {"micro": 4, "schedule": "interleaved", "chunks": 2}), (Layout(pp=4), {"micro": 2}),
    ]  # fmt: skip
    for layout, options in layouts:
        for formula, sent in four.call(on_ranks.predicted_and_sent, name, layout, rows, bucket=1 << 30, **options):
            assert formula.keys() == sent.keys(), (layout, options)
            for key in sent:
                assert sent[key] == pytest.approx(formula[key], abs=200), (layout, options, key)
