"""A cached prefix is found only while everything that its keys and values depend on is the same."""

from dataclasses import replace

import pytest
import torch
from small_served import adapter, llama

from finetune.inference.engine import Engine
from finetune.inference.fingerprint import Fingerprint, state
from finetune.inference.packed import pack
from finetune.inference.sampler import Sampling
from finetune.peft.adapters import load_adapter
from finetune.peft.lora import activate
from finetune.peft.quantize import quantize_linears

PROMPT = [*range(40)]


def trained(model):
    optimizer = torch.optim.AdamW([model.blocks[1].mlp.up.weight], lr=0.1)
    model(torch.tensor([PROMPT])).square().mean().backward()
    optimizer.step()
    model.zero_grad()


def edited(model):
    with torch.no_grad():
        model.blocks[0].attn.v.weight[3, 5] += 1  # one number


def edited_past_torchs_count(model):
    model.blocks[0].attn.k.weight.data.mul_(2)


def loaded(model):
    model.load_state_dict(llama(tied=True).state_dict() | {"norm.weight": torch.full_like(model.norm.weight, 2.0)})


def replaced(model):
    model.blocks[0].mlp.down.weight = torch.nn.Parameter(model.blocks[0].mlp.down.weight * 2)


def switched_off(model):
    activate(model, {})


def asked(engine):
    """The answer, and how many tokens of the prompt were cached."""
    before = engine.scheduler.hits
    one = engine.add(PROMPT, Sampling(logprobs=0), 4)
    engine.run()
    return (one.answer, [each.chosen for each in one.logprobs]), engine.scheduler.hits - before


@pytest.mark.parametrize("change", [trained, edited, edited_past_torchs_count, loaded, replaced, switched_off])
def test_changed_weights_have_other_keys(change, tmp_path):
    model = llama()
    if change is switched_off:
        load_adapter(model, adapter(tmp_path))
    engine = Engine(model, blocks=50)
    first, hits = asked(engine)
    assert hits == 0
    assert asked(engine) == (first, 32)
    change(model)
    fresh, _ = asked(Engine(model, blocks=50))
    assert fresh != first
    assert asked(engine) == (fresh, 0)
    assert asked(engine) == (fresh, 32)


def root(engine):
    """What the keys of a new sequence begin with."""
    return engine.add([1, 2], Sampling(), 1).table.root


def test_the_caches_dtype_and_the_configuration_are_in_the_key():
    model = llama()
    plain, same = Engine(model, blocks=5), Engine(model, blocks=9)
    assert root(plain) == root(same)
    found = {root(Engine(model, blocks=5, cache_dtype=dtype)) for dtype in (torch.int8, torch.float8_e4m3fn)}
    assert len(found | {root(plain)}) == 3
    before, model.config = root(plain), replace(model.config, rope_theta=1e5)
    assert root(plain) != before


@pytest.mark.parametrize("few_bits", [lambda model: quantize_linears(model, "int8"), lambda model: pack(model, "int4")])
def test_every_weight_counts(few_bits):
    model = llama(qk_norm=True, qkv_bias=True, tied=False)
    few_bits(model)
    look = Fingerprint(model)
    seen = {look()}
    for tensor in state(model)[0]:
        tensor.data.view(torch.uint8).bitwise_xor_(1)
        seen.add(look())
    assert len(seen) == 1 + len(state(model)[0]) > 30
