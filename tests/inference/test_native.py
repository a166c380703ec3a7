"""The native pass against the model's own modules, and that a token's bits depend on its own sequence alone."""

import random

import pytest
import torch
from small_served import SIZES, adapter, llama, prompts, wide

from finetune.environment import CPU_LEVELS
from finetune.inference.engine import Engine
from finetune.inference.native import unsupported
from finetune.inference.packed import pack
from finetune.inference.sampler import Sampling
from finetune.inference.scheduler import Sequence
from finetune.lm.gpt import GPT, GPTConfig
from finetune.ops import use_backend

FAMILIES = {
    "llama": {"kv_heads": 1},
    "mistral": {"window": 5, "window_layers": (0,), "tied": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "smollm3": {"nope_layers": (1,), "o_bias": True, "mlp_bias": True},
    "gemma2": {
        "norm_plus_one": True, "post_norms": True, "activation": "gelu_tanh", "embedding_scale": 5.0,
        "attention_softcap": 5.0, "logit_softcap": 3.0, "window": 3, "window_layers": (1,), "local_rope_theta": 100.0,
    },
    "odd": {"dim": 36, "hidden": 50, "heads": 3, "kv_heads": 1, "head_dim": 10, "vocab_size": 101},
}  # fmt: skip
FORMATS = ("fp32", "bf16", "int8", "int4", "nf4")
GENERAL = {"dim": 64, "hidden": 96}


def packed(format, dtype=torch.float32, **given):
    model = llama(**GENERAL | given)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    return pack(model.to(dtype), format)


def found(engine, some, most_new=3, logits=True, arrivals=None):
    """Of each prompt the answer, and the logits of each of its tokens."""
    sequences, seen = [], {}

    def receive(sequence: Sequence, row):
        seen.setdefault(id(sequence), []).append(row.clone())
        engine.choose(sequence, row[None])

    waiting = list(some)
    while waiting or engine.busy:
        if waiting and (arrivals is None or arrivals.random() < 0.5):
            sequences.append(engine.add(waiting.pop(0), Sampling(), most_new))
            sequences[-1].receive = receive if logits else None
        engine.step()
    return [one.answer for one in sequences], [torch.stack(seen[id(one)]) for one in sequences if logits]


def both(model, some, **limits):
    """By the native pass, and by the modules."""
    for native in (True, False):
        engine = Engine(model, **{"blocks": 60, "block_size": 8, "most_tokens": 23} | limits)
        assert engine.cache.native, engine.cache.why_not_native
        if not native:
            engine.cache.native = None
        yield found(engine, some)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_modules_do(family, format):
    model = packed(format, **FAMILIES[family])
    (answers, logits), (wanted, theirs) = both(model, prompts(8))
    assert answers == wanted
    for mine, their in zip(logits, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4 * float(their.abs().max()))


@pytest.mark.parametrize("format", FORMATS)
def test_in_bf16_it_is_as_close_to_exact_as_the_modules(format):
    """Exact: the same packed weights, and activations in fp32."""
    exact = packed(format)
    for p in exact.parameters():  # norms, as the model in bf16 has them
        p.data = p.data.bfloat16().float()
    model = packed(format, torch.bfloat16)
    if format not in ("fp32", "bf16"):
        exact = pack_like(exact, model)
    engine = Engine(exact, blocks=60)
    engine.cache.native = None
    _, right = found(engine, prompts(8), most_new=1)
    (_, mine), (_, modules) = both(model, prompts(8))
    first = [torch.stack([one[0].float() for one in some]) for some in (mine, modules, right)]
    size = first[2].pow(2).mean().sqrt()
    errors = [float((some - first[2]).pow(2).mean().sqrt() / size) for some in first[:2]]
    assert errors[0] < 1.2 * errors[1] + 1e-4


def pack_like(exact, model):
    """`exact` with the packed weights of `model`, which were quantized from bf16."""
    for name, module in model.named_modules():
        if hasattr(module, "weight") and hasattr(module, "in_features"):
            exact.get_submodule(name).weight = module.weight
    exact.embed.table = model.embed.table
    return exact


LIMITS = (
    {"blocks": 60, "block_size": 8, "most_tokens": 512},
    {"blocks": 7, "block_size": 8, "most_tokens": 512},  # preemption
    {"blocks": 60, "block_size": 4, "most_tokens": 7},
    {"blocks": 400, "block_size": 1, "most_tokens": 1},
    {"blocks": 60, "block_size": 8, "most_sequences": 3, "prefix_cache": False},
)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("format", "cache"),
    [("fp32", None), ("bf16", None), ("int8", torch.int8), ("int4", torch.float8_e4m3fn), ("nf4", torch.float32)],
    ids=str,
)
def test_logits_are_the_same_bits_in_any_company(format, cache, threads):
    model, some = packed(format, torch.float32 if format == "fp32" else torch.bfloat16), prompts(10)
    alone = [found(Engine(model, blocks=20, cache_dtype=cache), [one], 12)[1][0] for one in some]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for limits in LIMITS if threads == 1 else LIMITS[:1]:
            engine = Engine(model, cache_dtype=cache, **limits)
            _, together = found(engine, some, 12, arrivals=random.Random(0))
            assert engine.scheduler.preemptions or limits != LIMITS[1]
            for mine, wanted in zip(together, alone, strict=True):
                assert torch.equal(mine, wanted), limits
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*cpp not used")  # the modules: no op of theirs mixes fp32 and bf16
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("cache", [None, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_long_prompts_are_attended_in_pieces(cache, window):
    """More than the 256 tokens that attention takes at once: their results are joined, by one thread or by several."""
    rules = {"window": window, "window_layers": (0,)} if window else {}
    model, rng = packed("fp32", max_length=1024, kv_heads=2, **rules), random.Random(0)
    some = [[rng.randrange(100) for _ in range(n)] for n in (255, 257, 700)]
    limits = {"blocks": 200, "cache_dtype": cache, "most_tokens": 300}
    (answers, logits), (wanted, theirs) = both(model, some, **limits)
    assert cache or answers == wanted
    for mine, their in zip(logits, theirs, strict=True):
        tolerance = 0.03 if cache else 1e-4  # a last bit decides how a key is rounded
        torch.testing.assert_close(mine, their, rtol=tolerance, atol=tolerance * float(their.abs().max()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        alone = [found(Engine(model, **limits), [one])[1][0] for one in some]
        assert all(map(torch.equal, logits, alone))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("format", FORMATS)
def test_states_are_those_after_the_last_norm(format):
    model, some = packed(format), prompts(6)
    states = {}
    for native in (True, False):
        engine = Engine(model, blocks=60, most_tokens=23)
        if not native:
            engine.cache.native = None
        for i, prompt in enumerate(some):
            own = states[native, i] = []

            def watch(sequence, start, part, own=own, engine=engine):
                own.append(part)
                if start + len(part) == len(sequence.prompt):
                    engine.end(sequence)

            engine.add(prompt, Sampling(), 1, watch=watch if i % 2 else None)
        engine.run()
    for i in range(1, len(some), 2):
        mine, theirs = (torch.cat(states[native, i]) for native in (True, False))
        assert mine.shape == (len(some[i]), 64)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def levels():
    return CPU_LEVELS[: CPU_LEVELS.index(torch.ops.finetune.cpu_level_supported()) + 1]


@pytest.mark.parametrize("level", levels())
def test_every_level_computes_the_same(level):
    before = torch.ops.finetune.cpu_level()
    torch.ops.finetune.set_cpu_level(level)
    try:
        for format in FORMATS:
            (answers, logits), (wanted, theirs) = both(packed(format), prompts(4))
            assert answers == wanted
            for mine, their in zip(logits, theirs, strict=True):
                torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4 * float(their.abs().max()))
    finally:
        torch.ops.finetune.set_cpu_level(before)


@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_tokens_are_those_of_the_largest_logits(format):
    model = packed(format, vocab_size=99)  # the last panel of the head is not full
    tokens, _ = found(Engine(model, blocks=60), prompts(), most_new=20, logits=False)
    wanted, logits = found(Engine(model, blocks=60), prompts(), most_new=20)
    assert tokens == wanted
    assert tokens == [rows.argmax(-1).tolist() for rows in logits]


@pytest.mark.parametrize("threads", [1, 2])
def test_of_equal_logits_the_smallest_token_is_chosen(threads):
    model = llama(**GENERAL)
    with torch.no_grad():
        model.embed.weight[50:] = model.embed.weight[:50]  # a panel and a thread further
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        answers, _ = found(Engine(pack(model, "fp32"), blocks=60), prompts(), logits=False)
    finally:
        torch.set_num_threads(before)
    assert max(map(max, answers)) < 50


def test_requests_with_adapters_go_through_the_modules_and_others_do_not_feel_it(tmp_path):
    folder = adapter(tmp_path / "a", model=llama(**GENERAL))
    model = packed("int8", torch.bfloat16)
    _, alone = found(Engine(model, blocks=60), prompts(6))
    engine, logits = Engine(model, blocks=60, adapters={"a": folder}), {}

    def receive(sequence, row):
        logits.setdefault(id(sequence), []).append(row.clone())
        engine.choose(sequence, row[None])

    sequences = []
    for prompt in prompts(6):
        sequences.append(engine.add(prompt, Sampling(), 3))
        engine.add(prompt, Sampling(), 3, adapter="a")
        sequences[-1].receive = receive
    engine.run()
    for one, wanted in zip(sequences, alone, strict=True):
        assert torch.equal(torch.stack(logits[id(one)]), wanted)


def test_what_it_does_not_compute_it_names():
    gpt = wide(GPT(GPTConfig(vocab_size=100, dim=32, layers=2, heads=4, max_length=128)))
    dynamic = packed("fp32", rope_scaling={"kind": "dynamic", "factor": 2.0, "original_length": 32})
    for model, dtype, why in (
        (pack(gpt, "fp32"), None, "not a GPT"),
        (dynamic, None, "dynamic rope scaling"),
        (llama(), None, "embed is not packed"),
        (packed("fp32"), torch.float16, "cache of float16"),
    ):
        assert why in (unsupported(model, dtype) or "")
    with use_backend("reference"):
        assert "reference is forced" in (unsupported(packed("fp32")) or "")
    assert unsupported(packed("fp32")) is None


def test_a_plan_with_wrong_numbers_is_refused():
    native = Engine(packed("fp32"), blocks=4, block_size=4).cache.native
    assert native
    tokens, blocks = torch.tensor([1, 2, 3]), torch.tensor([0, 1], dtype=torch.int32)
    for ids, plan, table, what in (
        ([1, 2, 100], [0, 3, 0, 1, 0], blocks, "vocabulary"),
        ([1, 2, 3], [0, 2, 0, 1, 0], blocks, "as many tokens"),
        ([1, 2, 3], [6, 3, 0, 1, 0], blocks, "too few blocks"),
        ([1, 2, 3], [0, 3, 0, 1, 0], blocks + 4, "outside of the pool"),
        ([1, 2, 3], [127, 3, 0, 1, 0], blocks.repeat(20), "rotary"),
        ([1, 2, 3], [0, 3, 0, 4, 0], blocks, "more rows"),
    ):
        with pytest.raises(RuntimeError, match=what):
            native.step(native.handle, torch.tensor(ids), torch.tensor([plan]), table)
    best, logits, _ = native.step(native.handle, tokens, torch.tensor([[0, 3, 0, 2, 0]]), blocks)
    assert best.shape == (2,)
    assert logits.shape == (0, SIZES["vocab_size"])
    handle = native.handle
    del native
    with pytest.raises(RuntimeError, match="no such model"):
        torch.ops.finetune.llama_step(handle, tokens, torch.tensor([[0, 3, 0, 1, 0]]), blocks)
