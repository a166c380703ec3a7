"""nanogpt's toy, its own loss and rows, for 20 steps: every layout has the losses of one process to 1e-5."""

import dataclasses

import numpy as np
import pytest
import torch

from finetune import ops, optim
from finetune.data.text import open_text
from finetune.distributed import work
from finetune.distributed.launch import Ranks
from finetune.distributed.mesh import Layout
from finetune.distributed.stage import initial
from finetune.runs import registry
from finetune.runs.run import stable_hash

NANOGPT = registry.load(registry.find("nanogpt"))
CONFIG = dataclasses.replace(NANOGPT.Config.toy(), sample_tokens=0)
STEPS = 20


@pytest.fixture(scope="module")
def toy():
    """The shape, the batches, and the losses of nanogpt's loop in this process."""
    text = open_text(None)
    tokenizer = NANOGPT.make_tokenizer("char", 0, text.pieces(0, text.cut))
    train = np.array(tokenizer.encode("".join(text.pieces(0, 100_000))), np.uint16)
    shape = NANOGPT.model_config(CONFIG, tokenizer.vocab_size)
    batches, losses = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(stable_hash(0, "batch", step))
        starts = torch.randint(len(train) - CONFIG.length, (CONFIG.batch,), generator=generator)
        batches.append(NANOGPT.rows_at(train, starts, CONFIG.length))
    model, weights = NANOGPT.make_model(shape, "float32"), initial(shape, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name))
    optimizer = optim.AdamW(optim.decay_groups(model.parameters(), CONFIG.weight_decay), betas=(0.9, CONFIG.beta2))
    for step, rows in enumerate(batches):
        loss = NANOGPT.language_loss(model, rows)
        loss.backward()
        ops.clip_grad_norm_([p.grad for p in model.parameters()], CONFIG.clip)
        optimizer.step(lr=rate(step))
        optimizer.zero_grad()
        losses.append(loss.item())
    return shape, batches, losses


def rate(step):
    return optim.cosine(step, CONFIG.steps, 5, CONFIG.lr, CONFIG.lr / 10)


def equal(ranks, toy, layout, **options):
    shape, batches, losses = toy
    optimizer = {"weight_decay": CONFIG.weight_decay, "betas": (0.9, CONFIG.beta2)}
    ranks.call(work.begin, shape, layout, 0, optimizer, length=CONFIG.length, **options)
    for step, rows in enumerate(batches):
        for loss, _ in ranks.call(work.step, step, rows, rate(step), CONFIG.clip):
            assert loss == pytest.approx(losses[step], abs=1e-5), (str(layout), step)
    assert losses[-1] < losses[0] - 0.5, "the loss moved"


@pytest.mark.long
def test_one_rank(toy):
    with Ranks(1) as one:
        equal(one, toy, Layout())


@pytest.mark.long  # the run of the module makes the same comparison, and its test is a default one
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(cp=2)], ids=str)
def test_two_ranks(two, toy, layout):
    equal(two, toy, layout, micro=4)


def test_four_ranks(four, toy):
    equal(four, toy, Layout(tp=2, pp=2), micro=5)


@pytest.mark.long
@pytest.mark.parametrize("options", [{"sequence": True}, {"schedule": "gpipe"}, {"sharded": True}], ids=str)
def test_four_ranks_with_options(four, toy, options):
    for layout in (Layout(tp=2, dp=2), Layout(tp=2, cp=2), Layout(pp=2, dp=2)):
        equal(four, toy, layout, micro=4, **options)
