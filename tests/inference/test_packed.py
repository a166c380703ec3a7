"""Packed models: the same logits as the dense model of the dequantized weights, their bytes, what the bits cost."""

import copy
import gc
import math
import weakref

import pytest
import torch
from small_families import family
from small_served import llama, prompts, wide
from torch import nn

from finetune.errors import UserError
from finetune.inference.engine import Engine
from finetune.inference.generate import generate
from finetune.inference.packed import PackedEmbedding, PackedLinear, pack, packed_weights, read_bytes, weight_bytes
from finetune.inference.quality import quality
from finetune.inference.sampler import Sampling
from finetune.lm import head
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.llama import Llama, LlamaConfig
from finetune.memory.packed import packed_bytes
from finetune.memory.setup import shape_of
from finetune.ops.quantized_linear import FORMATS
from finetune.peft import lora

ODD = {"vocab_size": 101, "dim": 36, "heads": 3, "kv_heads": 1, "hidden": 50}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 35]])


def gpt(**given):
    return wide(GPT(GPTConfig(**{"vocab_size": 101, "dim": 36, "layers": 2, "heads": 3, "max_length": 64} | given)))


MODELS = {
    "tied": llama,
    "untied": lambda: llama(tied=False),
    "odd": lambda: llama(**ODD),
    "odd untied": lambda: llama(**ODD, tied=False, qkv_bias=True, mlp_bias=True),
    "gpt": gpt,
    **{f"family {name}": lambda name=name: family(name).eval() for name in ("qwen3", "gemma2", "gemma3")},
}


def dequantized(model, dense):
    """The dense model with the weights that the packed one stands for."""
    dense = copy.deepcopy(dense)
    with torch.no_grad():
        for name, weight in packed_weights(model):
            name = "head" if name == "packed_head" else name
            dense.get_parameter(f"{name}.weight").copy_(weight.dequantize())
    return dense


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_dequantized_weights(name, format):
    dense = MODELS[name]()
    model = pack(copy.deepcopy(dense), format)
    dense_layers = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert dense_layers == ({"positions"} if name == "gpt" else set())
    formats = {weight.format for _, weight in packed_weights(model)}
    assert formats == ({format} if format in ("fp32", "bf16", "int8") else {format, "int8"})
    with torch.no_grad():
        ours, wanted = model(TOKENS), dequantized(model, dense)(TOKENS)
        assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        state = torch.randn(5, dense.config.dim)
        loss = head.cross_entropy(model, state, torch.arange(5))
        assert torch.allclose(loss, head.cross_entropy(dequantized(model, dense), state, torch.arange(5)), rtol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
def test_bytes_are_those_of_the_formula(name, format, dtype):
    model = pack(MODELS[name]().to(dtype), format)
    element = {torch.float32: 4, torch.bfloat16: 2}[dtype]
    assert weight_bytes(model) == packed_bytes(shape_of(model.config), format, element=element)
    held = {t.untyped_storage().data_ptr() + t.storage_offset() * t.element_size(): t.nbytes
            for _, weight in packed_weights(model) for t in weight.tensors}  # fmt: skip
    assert sum(held.values()) == sum(weight.nbytes for _, weight in packed_weights(model))  # each its own memory


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_in_memory_once_and_originals_are_gone(tied):
    model = llama(tied=tied)
    gone = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
    pack(model, "int4")
    gc.collect()
    assert not [one for one in gone if one() is not None]
    assert isinstance(model.embed, PackedEmbedding)
    assert (model.embed.table is model.packed_head.weight) == tied
    table = model.embed.table
    assert weight_bytes(model) - read_bytes(model) == (0 if tied else table.nbytes)
    assert torch.equal(model.embed(TOKENS), table.dequantize()[TOKENS])


def test_another_format_for_the_head():
    model = pack(llama(), "int4", head="bf16")
    assert {name: w.format for name, w in packed_weights(model) if "block" not in name} == {"embed": "bf16"}
    assert weight_bytes(model) == packed_bytes(shape_of(model.config), "int4", "bf16", element=4)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_the_engine_serves_it(format):
    dense = llama()
    model = pack(copy.deepcopy(dense), format)
    engine = Engine(model, blocks=25, block_size=4, most_tokens=11)
    sequences = [engine.add(prompt, Sampling(), 10) for prompt in prompts()]
    engine.run()
    wanted = [generate(dequantized(model, dense), [prompt], 10)[0] for prompt in prompts()]
    assert [one.answer for one in sequences] == wanted


def test_adapters_must_be_merged_first():
    model = llama()
    lora.apply_lora(model, rank=2)
    with pytest.raises(UserError, match=r"attn\.q has an adapter: merge it"):
        pack(model, "int8")
    lora.merge(model)
    assert isinstance(pack(model, "int8").blocks[0].attn.q, PackedLinear)


# --- what the bits cost


TEXT = "".join(f"{a} plus {b} is {a + b}, {a} times {b} is {a * b}; " for a in range(12) for b in range(12))


@pytest.fixture(scope="module")
def trained():
    """A small model of characters, trained until its weights are no longer random, and rows of its text."""
    torch.manual_seed(0)
    letters = {c: i for i, c in enumerate(sorted(set(TEXT)))}
    ids = torch.tensor([letters[c] for c in TEXT])
    model = Llama(
        LlamaConfig(len(letters), dim=96, layers=2, heads=3, kv_heads=1, hidden=224, max_length=64, tied=False)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        starts = torch.randint(len(ids) - 64, (16,))
        rows = ids[starts[:, None] + torch.arange(65)]
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5 * math.log(len(letters))
    return model.eval(), ids[: len(ids) // 64 * 64].view(-1, 64).tolist()


BOUNDS = {"bf16": 0.005, "int8": 0.02, "int4": 0.15, "nf4": 0.25}  # nats of loss


@pytest.mark.parametrize("format", BOUNDS)
def test_the_loss_changes_little(trained, format):
    dense, rows = trained
    found = quality(pack(copy.deepcopy(dense), format), dense, rows)
    assert abs(found.change) <= BOUNDS[format]
    assert 0 <= found.divergence <= BOUNDS[format]
    assert found.tokens == sum(len(row) - 1 for row in rows)


def test_a_ruined_model_is_seen(trained):
    dense, rows = trained
    ruined = copy.deepcopy(dense)
    with torch.no_grad():
        for p in ruined.blocks.parameters():
            p.mul_(1 + torch.randn_like(p))
    found = quality(ruined, dense, rows)
    assert found.change > 0.25
    assert found.same < 0.95
    alone = quality(dense, dense, rows)
    assert (alone.change, alone.divergence, alone.same) == (0, 0, 1)
