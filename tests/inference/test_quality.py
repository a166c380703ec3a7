"""What few bits cost SmolLM2 on Python's documentation. Its file has 4 bits itself, in groups whose grid int4 finds
again; so int4 is judged on the same function with weights that are on no grid, too."""

import copy

import pytest
import torch

from finetune.data import python_docs
from finetune.inference import quantize
from finetune.inference.packed import from_gguf, pack
from finetune.inference.quality import quality
from finetune.lm.io import smollm2 as own
from finetune.lm.io.gguf import GGUFModel


class Remembered:
    """A model that computes each row once."""

    def __init__(self, model):
        self.model, self.norm, self.found = model, model.norm, {}

    def __call__(self, tokens):
        key = tuple(tokens.flatten().tolist())
        if key not in self.found:
            self.found[key] = self.model(tokens)
        return self.found[key]


@torch.no_grad()
def off_grid(model):
    """The same function with other weights: each channel between two matrices (or a norm and a matrix) is multiplied by
    0.8 … 1.2 in the first and divided by it in the second."""
    g = torch.Generator().manual_seed(0)

    def factors(count):
        return 0.8 + 0.4 * torch.rand(count, generator=g)

    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        for norm, readers in ((block.attn_norm, (attn.q, attn.k, attn.v)), (block.mlp_norm, (mlp.gate, mlp.up))):
            s = factors(len(norm.weight))
            norm.weight.mul_(s)
            for one in readers:
                one.weight.div_(s)
        s = factors(len(attn.v.weight))
        attn.v.weight.mul_(s[:, None])
        heads = s.view(model.config.kv_heads, 1, -1).expand(-1, model.config.heads // model.config.kv_heads, -1)
        attn.o.weight.div_(heads.flatten())
        s = factors(len(mlp.up.weight))
        mlp.up.weight.mul_(s[:, None])
        mlp.down.weight.div_(s)
    return model


@pytest.fixture(scope="module")
def rows(smollm2_tokenizer):
    """About 1,500 tokens: answers of the documentation end to end, in rows of 256."""
    text = " ".join(pair.answer for pair in python_docs.python_pairs()[::25][:90])
    ids = smollm2_tokenizer.encode(text)[: 6 * 256]
    return [ids[i : i + 256] for i in range(0, len(ids), 256)]


@pytest.fixture(scope="module")
def dense(smollm2_model):
    return Remembered(smollm2_model)


# Nats, of the loss and of the divergence.
BOUNDS = {"bf16": (0.005, 0.001), "int8": (0.02, 0.02), "int4": (0.15, 0.2), "nf4": (0.4, 0.5)}


@pytest.mark.long
@pytest.mark.parametrize("grid", [True, False], ids=["as it is", "off the grid"])
@pytest.mark.parametrize("format", BOUNDS)
def test_smollm2(dense, rows, format, grid, record_property):
    model = copy.deepcopy(dense.model)
    found = quality(pack(model if grid else off_grid(model), format), dense, rows)
    record_property("quality", str(found))
    assert abs(found.change) <= BOUNDS[format][0], found
    assert found.divergence <= BOUNDS[format][1], found


@pytest.mark.long
def test_smollm2_in_the_files_own_blocks(dense, rows):
    found = quality(from_gguf(GGUFModel(own.gguf()), torch.float32), dense, rows)
    assert abs(found.change) <= 0.002, found
    assert found.divergence <= 0.001, found


@pytest.mark.long
def test_the_search_of_int4_pays(dense, rows, monkeypatch):
    """Without it the divergence is at least twice as large."""
    with_search = quality(pack(off_grid(copy.deepcopy(dense.model)), "int4"), dense, rows)
    monkeypatch.setattr(quantize, "STEPS", ())
    without = quality(pack(off_grid(copy.deepcopy(dense.model)), "int4"), dense, rows)
    assert 2 * with_search.divergence < without.divergence, (with_search, without)
