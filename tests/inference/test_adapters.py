"""LoRA adapters chosen per request: a request of a mixed batch gets what a model with its adapter gives it alone."""

import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_served import adapter, llama, prompts

from finetune.errors import UserError
from finetune.inference.adapters import Adapters
from finetune.inference.beams import BeamSearch, samples
from finetune.inference.engine import Engine
from finetune.inference.generate import generate
from finetune.inference.packed import pack
from finetune.inference.sampler import Sampling
from finetune.inference.speculative import PromptLookup
from finetune.peft.adapters import CONFIG, TENSORS, load_adapter, save_adapter
from finetune.peft.quantize import quantize_linears
from finetune.peft.whole import train_modules

KINDS = {
    "plain": {},
    "other": {"rank": 3, "alpha": 9.0, "targets": ("q", "v")},
    "rslora": {"rank": 5, "rslora": True, "targets": ("o", "down", "head")},
    "patterns": {"rank": 2, "rank_pattern": {"blocks.0.mlp.up": 7}, "alpha_pattern": {"attn.k": 40.0}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("adapters")
    return {name: adapter(at / name, seed, **given) for seed, (name, given) in enumerate(KINDS.items())}


def attached(folder, change=lambda model: None):
    model = llama()
    change(model)
    if folder:
        load_adapter(model, folder)
    return model


def alone(folders, count=10, most_new=8, **given):
    """What each request gets from a model with its adapter on it; the adapters take turns, the base among them."""
    models = {name: attached(folder, **given) for name, folder in ({None: None} | folders).items()}
    names = [list(models)[i % len(models)] for i in range(count)]
    asked = list(zip(prompts(count), names, strict=True))
    return asked, [generate(models[name], [prompt], most_new)[0] for prompt, name in asked]


@pytest.fixture(scope="module")
def wanted_alone(folders):
    return alone(folders)


LIMITS = (
    {"blocks": 200},
    {"blocks": 15, "block_size": 4},  # preempts
    {"blocks": 60, "most_tokens": 7},
    {"blocks": 90, "drafter": PromptLookup(3, 2)},
)


@pytest.mark.parametrize("limits", LIMITS, ids="-".join)
def test_each_request_of_a_mixed_batch_gets_what_its_adapter_gives_alone(folders, wanted_alone, limits):
    asked, wanted = wanted_alone
    assert len({tuple(answer) for answer in wanted}) == len(wanted)
    engine, arrivals, found = Engine(llama(), **limits, adapters=folders), random.Random(1), []
    for prompt, name in asked:
        found.append(engine.add(prompt, Sampling(), 8, adapter=name))
        while engine.busy and arrivals.random() < 0.5:
            engine.step()
    engine.run()
    assert [one.answer for one in found] == wanted
    assert engine.pool.used == 0
    assert engine.scheduler.preemptions > 0 or limits["blocks"] != 15


def test_log_probabilities_are_those_of_the_attached_model(folders):
    engine, prompt = Engine(llama(), blocks=200, adapters=folders), prompts(1)[0]
    found = {name: engine.add(prompt, Sampling(logprobs=3), 1, adapter=name) for name in [None, *folders]}
    engine.run()
    for name, one in found.items():
        with torch.no_grad():
            logits = attached(folders[name] if name else None)(torch.tensor([prompt]))[0, -1]
        values, tokens = logits.log_softmax(-1).topk(3)
        assert list(one.logprobs[0].top) == tokens.tolist()
        torch.testing.assert_close(torch.tensor(list(one.logprobs[0].top.values())), values, rtol=0, atol=2e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_a_quantized_base_gets_adapters_too(folders, packed):
    chosen = {name: folders[name] for name in ("plain", "other", "patterns")}  # without the head: it has other codes
    asked, wanted = alone(chosen, 4, change=lambda model: quantize_linears(model, "int8"))
    model = llama()
    if packed:
        pack(model, "int8", head="fp32")
    else:
        quantize_linears(model, "int8")
    engine = Engine(model, blocks=200, adapters=chosen)
    found = [engine.add(prompt, Sampling(), 8, adapter=name) for prompt, name in asked]
    engine.run()
    assert [one.answer for one in found] == wanted


def test_a_bf16_base_keeps_adapters_in_fp32(folders):
    model = llama().bfloat16()
    engine = Engine(model, blocks=200, adapters=folders)
    one = engine.add(prompts(1)[0], Sampling(logprobs=1), 1, adapter="plain")
    engine.run()
    apart = attached(folders["plain"], change=lambda model: model.bfloat16())
    with torch.no_grad():
        wanted = apart(torch.tensor([prompts(1)[0]]))[0, -1].float().log_softmax(-1)
    assert abs(one.logprobs[0].chosen - float(wanted[one.answer[0]])) < 0.02
    assert {stack.down.dtype for stack in engine.adapters.stacks.values()} == {torch.float32}


def test_samples_and_beams_have_an_adapter(folders):
    model, prompt = attached(folders["plain"]), prompts(1)[0]
    engine = Engine(llama(), blocks=200, adapters=folders)
    found = samples(engine, prompt, Sampling(), 8, 2, adapter="plain")
    beams = BeamSearch(engine, prompt, 2, 8, adapter="plain")
    engine.run()
    assert [one.answer for one in found] == [generate(model, [prompt], 8)[0]] * 2
    apart = Engine(model, blocks=200)
    wanted = BeamSearch(apart, prompt, 2, 8)
    apart.run()
    assert beams.best == wanted.best


def test_the_model_stays_the_base_and_is_served_by_another_engine(folders):
    model, prompt = llama(), prompts(1)[0]
    before = generate(model, [prompt], 5)[0]
    engine, plain = Engine(model, blocks=50, adapters=folders), Engine(model, blocks=50)
    engine.add(prompt, Sampling(), 5, adapter="plain")
    one = plain.add(prompt, Sampling(), 5)
    while engine.busy or plain.busy:
        engine.step(), plain.step()
    assert one.answer == before == generate(model, [prompt], 5)[0]
    assert not any(module._forward_hooks for module in model.modules())


def test_factors_are_stacked_without_padding(folders):
    found = Adapters(llama(), folders)
    up = found.stacks["blocks.0.mlp.up"]  # plain 4, patterns 7
    assert (up.down.shape, up.up.shape) == ((11, 32), (11, 64))
    assert {name: len(b) for name, (_, b) in up.views.items()} == {"plain": 4, "patterns": 7}
    assert up.views["patterns"][1].data_ptr() == up.up[4:].data_ptr()
    assert up.scale["patterns"] == 16 / 7
    assert found.stacks["blocks.1.attn.k"].scale["patterns"] == 40 / 2
    assert found.stacks["head"].scale == {"rslora": 16 / 5**0.5}
    held = [load_file(folder / TENSORS) for folder in folders.values()]
    assert found.nbytes == sum(t.nbytes for tensors in held for key, t in tensors.items() if "lora_" in key)


def test_the_prefix_caches_key_is_an_adapters_content_and_scale(folders, tmp_path):
    """Not its name; and each adapter's blocks are its own."""
    content = Adapters(llama(), {"a": folders["plain"], "b": folders["other"], "again": folders["plain"]}).digest
    assert content("a") == content("again") != content("b")
    assert content("b") == Adapters(llama(), {"a": folders["other"]}).digest("a") != content(None)
    scaled, changed = (adapter(tmp_path / name) for name in ("scaled", "changed"))
    config = json.loads((scaled / CONFIG).read_text())
    (scaled / CONFIG).write_text(json.dumps(config | {"lora_alpha": 17.0}))
    tensors = load_file(changed / TENSORS)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, changed / TENSORS)
    for folder in (scaled, changed):
        assert Adapters(llama(), {"a": folder}).digest("a") not in (content("a"), content("b"), content(None))
    prompt, hits = [*range(40)], []
    engine = Engine(llama(), blocks=99, adapters={"a": folders["plain"], "again": folders["plain"], "scaled": scaled})
    for name in ("a", "scaled", None, "again", "scaled", None):
        before = engine.scheduler.hits
        engine.add(prompt, Sampling(), 1, adapter=name)
        engine.run()
        hits.append(engine.scheduler.hits - before)
    assert hits == [0, 0, 0, 32, 32, 32]


def whole_embedding(model):
    train_modules(model, ["embed"])
    with torch.no_grad():
        model.embed.weight += 1


@pytest.mark.parametrize(
    ("change", "config", "what"),
    [
        ({"dora": True}, {}, "DoRA"), ({}, {"init_lora_weights": "pissa"}, "PiSSA"),
        ({}, {"use_qalora": True}, "use_qalora"),
        ({"whole": True}, {}, "embed with a weight of its own"), ({"dim": 16}, {}, "of this model"),
        ({"layers": 3}, {}, "blocks.2"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_low_rank_sum_of_this_model_is_refused_by_name(tmp_path, change, config, what):
    model = llama(**{key: value for key, value in change.items() if key in ("dim", "layers")})
    adapter(tmp_path, model=model, dora=change.get("dora", False))
    if change.get("whole"):
        whole_embedding(model)
        save_adapter(model, tmp_path)
    raw = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(raw | config))
    with pytest.raises(UserError, match=re.escape(what)) as error:
        Engine(llama(), blocks=10, adapters={"a": tmp_path})
    assert "\n" not in str(error.value)


def test_unknown_names_and_a_base_with_an_adapter_on_it_are_refused(folders):
    with pytest.raises(UserError, match=r"no adapter 'plane'.*plain"):
        Engine(llama(), blocks=10, adapters=folders).add([1], Sampling(), 1, adapter="plane")
    with pytest.raises(UserError, match="an adapter on it already"):
        Engine(attached(folders["plain"]), blocks=10, adapters=folders)
