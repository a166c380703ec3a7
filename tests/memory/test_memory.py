"""The memory formulas against live tensors, against the resident set, and against published figures."""

import gc
import re
import weakref
from math import prod

import pytest
import torch

from finetune import memory, ops, optim
from finetune.errors import UserError
from finetune.lm import presets
from finetune.lm.cache import KVCache
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.llama import Llama, LlamaConfig
from finetune.memory import Setup, activations, counts, formulas, meters, predict, shape_of, states
from finetune.ops.kv_cache import pool
from finetune.runs import plots

LLAMA = LlamaConfig(vocab_size=1000, dim=96, layers=3, heads=6, kv_heads=2, hidden=160, max_length=256)
GPT2 = GPTConfig(vocab_size=1000, dim=96, layers=3, heads=6, max_length=256)
SETUPS = [
    Setup(batch=2, seq=100),
    Setup(batch=1, seq=250, checkpointing="block"),
    Setup(batch=3, seq=64, dtype="bf16"),
    Setup(batch=1, seq=200, lora_rank=4),
    Setup(batch=1, seq=200, lora_rank=4, lora_targets="q,v"),
    Setup(batch=1, seq=200, lora_rank=4, dtype="bf16", checkpointing="block"),
    Setup(batch=1, seq=200, lora_rank=4, quantized="nf4_double"),
    Setup(batch=1, seq=200, lora_rank=4, adapter="dora", quantized="int8"),
    Setup(batch=2, seq=100, lora_rank=4, adapter="pissa", dtype="bf16", quantized="nf4"),
    Setup(batch=2, seq=100, prompt=10),
    Setup(batch=2, seq=100, prefix=10),
    Setup(batch=1, seq=64, optimizer="adamw8bit"),
    Setup(batch=1, seq=64, optimizer="adamw8bit", dtype="bf16"),
    Setup(batch=1, seq=64, optimizer="adamw8bit", lora_rank=3),
]


def short(setup):
    """What differs from a plain setup, as a test's name."""
    return "-".join(f"{k}_{v}" for k, v in vars(setup).items() if v != getattr(Setup(), k))


EACH_SETUP = pytest.mark.parametrize("setup", SETUPS, ids=short)


def build(config, setup):
    torch.manual_seed(0)
    model = meters.build(config, setup)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW(trained, lr=1e-3, moments="8bit" if setup.optimizer == "adamw8bit" else "fp32")
    tokens = torch.randint(config.vocab_size, (setup.batch, setup.seq), generator=torch.Generator().manual_seed(1))

    def loss():
        own = tokens[:, setup.prompt :]  # a prompt is counted in
        hidden = model.virtual(model, own, hidden=True) if hasattr(model, "virtual") else model(own, hidden=True)
        return ops.linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, own.flatten().roll(-1))

    loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, loss


def by_name(config, setup):
    return {term.name: term.bytes for term in predict(shape_of(config), setup)}


@EACH_SETUP
def test_llama(setup):
    """Weights, gradients and optimizer states to the byte; activations within 5 %."""
    measured = meters.measure(*build(LLAMA, setup))
    predicted = by_name(LLAMA, setup)
    for name in ("weights", "gradients", "optimizer states"):
        assert predicted[name] == measured[name] > 0, name
    assert predicted["activations"] == pytest.approx(measured["activations"], rel=0.05)


@pytest.mark.parametrize("setup", [s for s in SETUPS if not s.frozen], ids=short)
def test_gpt(setup):
    measured = meters.measure(*build(GPT2, setup))
    predicted = by_name(GPT2, setup)
    for name in ("weights", "gradients", "optimizer states"):
        assert predicted[name] == measured[name] > 0, name
    assert predicted["activations"] == pytest.approx(measured["activations"], rel=0.05)


def test_the_meter_of_activations_can_fail():
    """A tensor more that a backward pass needs is found, to the byte; one that nobody needs is not counted."""
    model, _, loss = build(LLAMA, SETUPS[0])
    plain = meters.saved_bytes(model, loss)
    extra = torch.randn(1000, requires_grad=True)

    def more():
        torch.zeros(999)
        return loss() + (extra * torch.randn(1000)).sum()

    assert meters.saved_bytes(model, more) == plain + 4000


def test_the_meter_of_activations_keeps_nothing():
    """exp saves its own output: returned from a hook as it is, that would be a cycle which is never freed."""
    inputs = [torch.ones(10, requires_grad=True)]
    gone = weakref.ref(inputs[0])
    assert meters.saved_bytes(torch.nn.Identity(), lambda: inputs[0].exp()) == 40
    inputs.clear()
    gc.collect()
    assert gone() is None


def test_tied_and_shared_storages_count_once():
    tied = Llama(LLAMA)
    assert meters.weight_bytes(tied) == 4 * sum(p.numel() for p in tied.parameters())
    x = torch.zeros(10, 10)
    assert meters.storage_bytes([x, x[2:], x.t(), torch.zeros(3)]) == 400 + 12


def test_naive_attention_keeps_its_matrices(monkeypatch):
    """The reference's T×T probabilities, as the formula says; flash attention keeps a small part of that."""
    setup = Setup(batch=2, seq=200, attention="naive")
    model, _, _ = build(LLAMA, setup)
    tokens = torch.zeros(2, 200, dtype=torch.int64)
    backends = ops.REGISTRY["attention"].backends
    monkeypatch.setitem(backends, "cpp", backends["reference"])

    def loss():
        hidden = model(tokens, hidden=True).flatten(0, 1)
        return ops.linear_cross_entropy(hidden, model.head_weight, tokens.flatten())

    measured = meters.saved_bytes(model, loss)
    assert by_name(LLAMA, setup)["activations"] == pytest.approx(measured, rel=0.05)
    assert measured > 2 * by_name(LLAMA, Setup(batch=2, seq=200))["activations"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
def test_attention_allocates_in_proportion_to_the_length(dtype):
    def peak(length):
        q, k, v = (torch.randn(1, length, heads, 64, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))

        def step():
            return torch.autograd.grad(ops.attention(q, k, v).float().sum(), (q, k, v))

        return meters.peak_allocated(step)

    lengths = (1024, 2048, 4096)
    peaks = [peak(length) for length in lengths]
    assert peaks[2] <= 2.05 * peaks[1] <= 2.05**2 * peaks[0]
    assert peaks[2] < 4 * 4096 * 4096 * dtype.itemsize / 3  # a third of one (heads, T, T) score matrix


@pytest.mark.parametrize("tokens", [700, 2500])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["chunked", "logprobs"])
def test_the_loss_allocates_what_the_formula_says(tokens, dtype, loss):
    config = LlamaConfig(vocab_size=20_000, dim=64, layers=1, heads=2, kv_heads=1, hidden=64, max_length=4096)
    setup = Setup(batch=1, seq=tokens, dtype=dtype, loss=loss)
    model = Llama(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    measured = meters.loss_bytes(model, shape_of(config), setup)
    assert by_name(config, setup)["logits"] == pytest.approx(measured, rel=0.05)
    if tokens == 2500:
        assert measured < 4 * tokens * config.vocab_size  # the logits of all tokens never exist at once


@pytest.mark.slow
@pytest.mark.parametrize(
    "setup",
    [Setup(batch=1, seq=1024), Setup(batch=1, seq=1024, checkpointing="block"), Setup(batch=1, seq=1024, lora_rank=8)],
    ids=short,
)
def test_peak_resident_growth(setup):
    """Within 15 %, on a model large enough that the process's own pages do not matter."""
    config = LlamaConfig(vocab_size=16_000, dim=512, layers=6, heads=8, kv_heads=4, hidden=1408, max_length=1024)
    measured = meters.measure(*build(config, setup))
    assert by_name(config, setup)["step growth"] == pytest.approx(measured["step growth"], rel=0.15)


def test_peak_finds_what_is_allocated():
    with meters.Peak() as peak:
        x = torch.ones(50_000_000)
        x += 1
        del x
    assert peak.growth == pytest.approx(200e6, rel=0.05)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt"])
def test_kv_cache(config):
    """2 × layers × KV heads × head dim × bytes a token, as the cache of lm/cache.py has it."""
    model = (Llama if config is LLAMA else GPT)(config)
    cache = KVCache(model, 3, 70)
    own = meters.storage_bytes(t for t in meters.tensors_in(list(vars(cache).values())) if t.is_floating_point())
    setup = Setup(batch=3, seq=70, optimizer="none")
    assert by_name(config, setup)["KV cache"] == own


@pytest.mark.parametrize("block", [1, 16, 13])
@pytest.mark.parametrize("kv_dtype", ["same", "int8", "fp8"])
def test_paged_kv_cache(kv_dtype, block):
    """The pools of ops.kv_cache, with just the blocks that the rows need, for every layer."""
    rows, tokens = 3, 70
    blocks = rows * -(-tokens // block)
    dtype = {"same": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv_dtype]
    own = 0
    for _ in range(2 * LLAMA.layers):
        cache, scale = pool(blocks, block, LLAMA.kv_heads, LLAMA.head_dim, dtype)
        own += cache.nbytes + (0 if scale is None else scale.nbytes)
    setup = Setup(batch=rows, seq=tokens, dtype="bf16", optimizer="none", kv_dtype=kv_dtype, kv_block=block)
    assert by_name(LLAMA, setup)["KV cache"] == own


def test_formulas_give_their_bytes():
    """Each printed formula, evaluated with the printed symbols, is the value next to it."""
    for config in (LLAMA, GPT2, presets.LLAMA["llama-7b"]):
        shape = shape_of(config)
        others = [Setup(optimizer="none", batch=4, seq=33), Setup(attention="naive", loss="full")]
        others += [Setup(zero=stage, ranks=7, algorithm="ppo", dtype="bf16") for stage in (1, 2, 3)]
        others += [Setup(zero=3, ranks=7, algorithm="ppo", lora_rank=4)]
        others += [Setup(optimizer="none", seq=33, kv_block=16, kv_dtype="fp8")]
        for setup in (*SETUPS, *others):
            if setup.frozen and setup.algorithm == "sft" and shape.family == "gpt":
                continue
            values = formulas.symbols(shape, setup)
            for term in predict(shape, setup)[:-1]:
                if term.name != "step growth":
                    text = re.sub(r"⌈(.+?)/(\w)⌉", r"-(-(\1)//\2)", term.formula).replace("·", "*")
                    assert eval(text, {"__builtins__": {}}, values) == term.bytes, (term.name, term.formula)


@EACH_SETUP
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt"])
def test_tensors_of_what_is_trained(config, setup):
    if setup.lora_targets == "all" and (config is LLAMA or not setup.frozen):
        shape = shape_of(config)
        sizes = counts.trained_tensors(shape, setup)
        assert sum(count * prod(size) for count, size, _ in sizes) == counts.trained(shape, setup)[0]


def test_published_figures():
    """Parameters: Touvron et al. 2023 (arXiv:2302.13971, table 2; the checkpoints' exact counts), Radford et al. 2019
    (124 M). 16 bytes a parameter with bf16 and Adam: Rajbhandari et al. 2020 (arXiv:1910.02054, §3.1: 7.5 billion need
    120 GB). KV cache: Llama-2-7B 512 KiB, Llama-3-8B 128 KiB, the 70Bs 320 KiB a token in 16 bits. Attention's
    5·a·s²/(s·h) of Korthikanti et al. 2022 is not kept at all."""
    count = {name: counts.parameters(shape_of(shape)) for name, shape in (presets.LLAMA | presets.GPT).items()}
    assert count["llama-7b"] == 6_738_415_616
    assert count["smollm2-135m"] == 134_515_008
    assert count["gpt2"] == 124_439_808
    for name in ("llama-7b", "gpt2"):
        terms = {t.name: t.bytes for t in predict(shape_of((presets.LLAMA | presets.GPT)[name]), Setup(dtype="bf16"))}
        assert sum(terms[n] for n in ("weights", "gradients", "optimizer states")) == 16 * count[name]
    per_token = {
        name: states.kv_cache(shape_of(presets.LLAMA[name]), Setup(dtype="bf16", optimizer="none", seq=1)).bytes
        for name in presets.LLAMA
    }
    assert per_token["llama-7b"] == 512 * 1024
    assert per_token["llama-3-8b"] == 128 * 1024
    assert per_token["llama-2-70b"] == per_token["llama-3-70b"] == 320 * 1024


def test_lora_shares():
    """Hu et al. 2021: r·(in + out) for each adapted layer; SmolLM2 at r = 8 on all linear layers."""
    shape = shape_of(presets.LLAMA["smollm2-135m"])
    want = 30 * 8 * sum(i + o for i, o in shape.linears.values())
    assert counts.adapter_parameters(shape, 8, tuple(shape.linears)) == want == 2_442_240


def test_rows_of_a_run():
    model, optimizer, loss = build(LLAMA, SETUPS[3])
    before = [p.clone() for p in model.parameters()]
    rows = memory.for_training(LLAMA, SETUPS[3], model=model, optimizer=optimizer, loss=loss)
    assert [row["name"] for row in rows] == [t.name for t in predict(shape_of(LLAMA), SETUPS[3])[:-1]]
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_the_picture_stacks_what_the_rows_say(tmp_path, monkeypatch):
    """Two bars a group, as high as the group's rows without step growth, which is a line; half a pair is left out."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    rows = [("a: weights", 4_000_000, 5_000_000), ("a: gradients", 2_000_000, 3_000_000), ("a: rest", 7, None)]
    rows += [("a: step growth", 1_000_000, 1_500_000), ("b: weights", 1_000_000, 500_000)]
    plots.memory(
        tmp_path / "x.png", "title", [dict(zip(("name", "predicted", "measured"), row, strict=True)) for row in rows]
    )
    axes = drawn[0].axes[0]
    tops = {}
    for bar in axes.patches:
        if bar.get_width():
            at = round(bar.get_y() + bar.get_height() / 2, 3)
            tops[at] = max(tops.get(at, 0), bar.get_x() + bar.get_width())
    assert tops == pytest.approx({-0.19: 6, 0.19: 8, 0.81: 1, 1.19: 0.5})
    lines = [segment[0][0] for lines in axes.collections for segment in lines.get_segments()]
    assert lines == pytest.approx([5, 6.5])
    plots.memory(tmp_path / "x.png", "title", [{"name": "rest", "predicted": 7, "measured": None}])
    assert len(drawn) == 1, "nothing to draw"


# --- many ranks, several models


@pytest.mark.parametrize(
    ("ranks", "gigabytes"),
    [
        (1, (120, 120, 120)), (4, (52.5, 41.3, 30)), (16, (35.6, 21.6, 7.5)),
        (64, (31.4, 16.6, 1.88)), (256, (30.4, 15.4, 0.47)), (1024, (30.1, 15.1, 0.12)),
    ],
)  # fmt: skip
def test_zero_as_published(ranks, gigabytes):
    """Rajbhandari et al. 2020 (arXiv:1910.02054), table 1, the model of 7.5 billion: GB of model states a rank."""
    shape = shape_of(presets.LLAMA["llama-7b"])
    scale = 7.5e9 / counts.parameters(shape)
    for stage, published in zip((1, 2, 3), gigabytes, strict=True):
        divided = {"zero": stage, "ranks": ranks} if ranks > 1 else {}
        terms = by_name(presets.LLAMA["llama-7b"], Setup(dtype="bf16", **divided))
        found = sum(terms[name] for name in ("weights", "gradients", "optimizer states")) * scale / 1e9
        assert found == pytest.approx(published, abs=0.06 if published > 1 else 0.006)


def test_activations_of_the_megatron_paper():
    """Korthikanti et al. 2022 (arXiv:2205.05198), §4.1 and table 2: 34·s·b·h + 5·a·s²·b a layer, of which recomputing
    attention saves 70 % for GPT-3 (5·a·s/h = 80) and 65 % for MT-NLG (64)."""
    for heads, length, width, ratio, saved in ((96, 2048, 12288, 80, 0.70), (128, 2048, 20480, 64, 0.65)):
        assert 5 * heads * length / width == ratio
        whole = activations.megatron_layer(length, 1, width, heads)
        assert whole == length * width * (34 + ratio)
        assert 1 - activations.megatron_layer(length, 1, width, heads, selective=True) / whole == pytest.approx(
            saved, abs=0.005
        )
        assert activations.megatron_layer(length, 1, width, heads, ranks=8, sequence=True) == whole / 8
        parallel = activations.megatron_layer(length, 1, width, heads, ranks=8)
        assert parallel == length * width * (10 + 24 / 8 + ratio / 8)


def test_the_models_of_an_algorithm():
    """bf16 with AdamW is 16 bytes a trained parameter, 2 a frozen one: SFT 16, DPO and GRPO 18, PPO 16 + 2 + 2 + 16."""
    config = presets.LLAMA["smollm2-135m"]
    count = counts.parameters(shape_of(config))
    kept = ("weights", "gradients", "optimizer states", "reference model", "reward model", "value model")

    def total(**kwargs):
        terms = by_name(config, Setup(dtype="bf16", **kwargs))
        return sum(terms.get(name, 0) for name in kept)

    assert total() == 16 * count
    assert total(algorithm="dpo") == total(algorithm="grpo") == 18 * count
    assert total(algorithm="ppo") == pytest.approx(36 * count, rel=1e-4)
    assert total(algorithm="ppo") > 36 * count, "the scalar heads"
    assert total(algorithm="dpo", lora_rank=8) == total(lora_rank=8), "the policy without adapters is the reference"
    assert total(algorithm="ppo", zero=3, ranks=8) == pytest.approx(36 * count / 8, rel=1e-4)
    adapter = counts.adapter_parameters(shape_of(config), 8, shape_of(config).linears)
    shared = total(algorithm="rlhf", lora_rank=8) - total(lora_rank=8)
    assert shared == 4 * adapter + 4 * (adapter + 576) + 16 * (adapter + 576), "three more adapters, two heads"


@pytest.mark.parametrize(
    ("name", "setup"),
    [
        ("llama-7b", Setup(dtype="bf16", seq=512)),
        ("llama-7b", Setup(dtype="bf16", seq=512, checkpointing="block")),
        ("llama-7b", Setup(dtype="bf16", seq=512, zero=1, ranks=64)),
        ("llama-7b", Setup(dtype="bf16", seq=512, zero=2, ranks=1024)),
        ("llama-7b", Setup(dtype="bf16", seq=512, zero=3, ranks=8)),
        ("llama-2-70b", Setup(dtype="bf16", seq=512)),
        ("llama-2-70b", Setup(dtype="bf16", seq=512, zero=1, ranks=1024)),
        ("llama-2-70b", Setup(dtype="bf16", seq=512, zero=2, ranks=8)),
        ("llama-2-70b", Setup(dtype="bf16", seq=512, zero=3, ranks=1024)),
        ("gpt2-xl", Setup(seq=256)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"zero{value.zero}-{value.ranks}",
)
def test_formulas_beside_a_simulated_step(name, setup):
    from finetune.memory.simulate import scaled

    config = (presets.LLAMA | presets.GPT)[name]
    for term, found in scaled(config, setup).items():
        assert by_name(config, setup)[term] == pytest.approx(found, rel=0.05), term


def test_depth_is_extrapolated_exactly():
    from finetune.memory.simulate import scaled, simulate

    config, setup = {**presets.LLAMA["smollm2-135m"], "layers": 7}, Setup(seq=64)
    assert scaled(config, setup) == simulate(config, setup)


def test_what_is_not_simulated_is_refused():
    from finetune.memory.simulate import simulate

    for setup in (Setup(lora_rank=4), Setup(optimizer="none")):
        with pytest.raises(UserError, match="simulated are training steps of all parameters"):
            simulate(presets.LLAMA["smollm2-135m"], setup)
    with pytest.raises(UserError, match="the stages are"):
        Setup(zero=4)
