"""The options of a setup: each formula against live optimizers, other people's estimates, or published figures."""

import re

import pytest
import torch

from finetune import ops
from finetune.errors import UserError
from finetune.lm import presets
from finetune.lm.gpt import GPTConfig
from finetune.lm.llama import LlamaConfig
from finetune.memory import Setup, activations, counts, formulas, lab, meters, predict, shape_of, states
from finetune.memory.optimizers import OPTIMIZERS

LLAMA = LlamaConfig(vocab_size=1000, dim=96, layers=3, heads=6, kv_heads=2, hidden=160, max_length=256, tied=False)
GPT2 = GPTConfig(vocab_size=1000, dim=96, layers=3, heads=6, max_length=256)
SEVEN = shape_of(presets.LLAMA["llama-7b"])
COUNT = counts.parameters(SEVEN)


def by_name(shape, setup):
    return {term.name: term.bytes for term in predict(shape, setup)}


def a_parameter(shape, setup, *names):
    """Bytes a parameter of these terms."""
    terms = by_name(shape, setup)
    return sum(terms[name] for name in names) / counts.parameters(shape)


STATES = ("weights", "gradients", "optimizer states")


# --- Optimizers


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt"])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in ("none", "adamw_bf16")])
def test_states_of_an_optimizer(optimizer, config):
    """To the byte, of fp32 parameters: this project's AdamW, torch's SGD, Muon and Adafactor."""
    setup = Setup(optimizer=optimizer)
    model = meters.build(config, setup)
    found = lab.states_of(model, setup, list(model.parameters()))
    assert found == by_name(shape_of(config), setup)["optimizer states"]


@pytest.mark.parametrize("optimizer", ["adamw_bf16", "sgd_momentum", "muon"])
def test_states_like_16_bit_parameters(optimizer):
    """Without masters torch's moments and momenta have the parameter's dtype; Muon's AdamW here fp32 ones."""
    setup = Setup(dtype="bf16", master=False, optimizer=optimizer)
    model = meters.build(LLAMA, setup)
    found = lab.states_of(model, setup, list(model.parameters()))
    rest = counts.parameters(shape_of(LLAMA)) - counts.trained_matrices(shape_of(LLAMA), setup)
    assert found + (4 * rest if optimizer == "muon" else 0) == by_name(shape_of(LLAMA), setup)["optimizer states"]


@pytest.mark.parametrize("rank", [0, 4])
def test_adapters_have_states_too(rank):
    for optimizer in ("sgd_momentum", "muon", "adafactor"):
        setup = Setup(dtype="bf16" if rank else "fp32", lora_rank=rank, optimizer=optimizer)
        model = meters.build(LLAMA, setup)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert lab.states_of(model, setup, trained) == by_name(shape_of(LLAMA), setup)["optimizer states"]


@pytest.mark.peer
def test_adafactor_beside_transformers():
    from transformers.optimization import Adafactor

    model = meters.build(LLAMA, Setup())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = Adafactor(model.parameters(), lr=0.0, relative_step=False, scale_parameter=False, warmup_init=False)
    optimizer.step()
    found = meters.optimizer_bytes(optimizer)
    assert found == by_name(shape_of(LLAMA), Setup(optimizer="adafactor"))["optimizer states"]


def test_bytes_a_parameter_as_published():
    """transformers' "Model training anatomy": 18 bytes a parameter of mixed precision with AdamW (2 + 4 of the weights,
    8 of the moments, 4 of fp32 gradients), 2 of 8-bit AdamW, 4 of SGD with momentum. Megatron-LM's distributed
    optimizer (dist_optimizer.md): bf16 parameters with fp32 gradients 18 and 6 + 12/d, fp32 16 and 8 + 8/d."""
    mixed = {"dtype": "bf16", "grad_dtype": "fp32"}
    assert a_parameter(SEVEN, Setup(**mixed), *STATES) == 18
    for ranks in (2, 8, 64):
        divided = {"zero": 1, "ranks": ranks}
        assert a_parameter(SEVEN, Setup(**mixed, **divided), *STATES) == pytest.approx(6 + 12 / ranks, rel=1e-6)
        assert a_parameter(SEVEN, Setup(**divided), *STATES) == pytest.approx(8 + 8 / ranks, rel=1e-6)
    assert a_parameter(SEVEN, Setup(), *STATES) == 16
    assert a_parameter(SEVEN, Setup(optimizer="adamw8bit"), "optimizer states") == pytest.approx(2, abs=0.04)
    assert a_parameter(SEVEN, Setup(optimizer="sgd_momentum"), "optimizer states") == 4
    assert a_parameter(SEVEN, Setup(optimizer="sgd"), "optimizer states") == 0


def test_adafactor_is_sublinear():
    """Shazeer & Stern 2018 (arXiv:1804.04235), §3: n + m numbers for a matrix of n × m, instead of n·m."""
    matrices = [(1, (4096, 11008))]
    assert sum(count * sum(size) for count, size in matrices) == 4096 + 11008
    assert a_parameter(SEVEN, Setup(optimizer="adafactor"), "optimizer states") < 0.005


def test_gradients_in_another_dtype_stay():
    """They are in the peak from the start, in the loss too, and a gradient in the parameter's dtype passes by."""
    setup, same = Setup(dtype="bf16", grad_dtype="fp32"), Setup(dtype="bf16")
    terms, plain = by_name(SEVEN, setup), by_name(SEVEN, same)
    assert terms["gradients"] == 2 * plain["gradients"]
    assert "gradients" in predict(SEVEN, setup)[-1].formula
    assert terms["peak"] == terms["weights"] + terms["gradients"] + terms["optimizer states"] + terms["step growth"]
    assert by_name(SEVEN, Setup(dtype="bf16", grad_dtype="bf16")) == plain


# --- Offload


def test_zero_offload_as_published():
    """Ren et al. 2021 (arXiv:2101.06840), §4: on the device remain the 16-bit parameters, 2 bytes of 16; gradients,
    moments and masters are the host's 14."""
    terms = predict(SEVEN, Setup(dtype="bf16", offload="optimizer"))
    assert formulas.host_bytes(terms) == 14 * COUNT
    assert terms[0].bytes == 2 * COUNT
    assert not terms[0].host
    everything = predict(SEVEN, Setup(dtype="bf16", offload="parameters"))
    assert formulas.host_bytes(everything) == 16 * COUNT
    assert everything[-1].bytes < terms[-1].bytes - 2 * COUNT + by_name(SEVEN, Setup(zero=3, ranks=2, dtype="bf16"))[
        "gathered parameters"
    ] + 1  # fmt: skip


def test_a_step_with_offload_holds_no_gradients():
    """At one token: a block's gradients and the head's, in 16 bits, or what the loss needs for the latter."""
    terms = by_name(SEVEN, Setup(dtype="bf16", seq=1, offload="optimizer"))
    block, table = 2 * counts.block_parameters(SEVEN), 2 * SEVEN.vocab * SEVEN.dim
    assert terms["step growth"] - terms["activations"] <= max(block + table, terms["logits"]) + (1 << 20)
    assert terms["step growth"] < by_name(SEVEN, Setup(dtype="bf16", seq=1))["step growth"] / 10


@pytest.mark.peer
@pytest.mark.parametrize("ranks", [1, 4, 8, 64])
def test_beside_deepspeeds_estimates(ranks):
    """deepspeed.runtime.zero: its ZeRO-2 keeps an fp32 copy of the 16-bit gradient next to the states, which AdamW here
    does not make, so 2 + 18/W bytes for 2 + 14/W. Its ZeRO-3 has fp32 gradients: 18/W, and the largest layer."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    host, device = estimate_zero2_model_states_mem_needs(COUNT, ranks, 1, cpu_offload=True, additional_buffer_factor=1)
    offloaded = predict(SEVEN, Setup(dtype="bf16", offload="optimizer"))
    assert device == 2 * COUNT == offloaded[0].bytes
    assert host == max(16, 4 * ranks) * COUNT
    assert formulas.host_bytes(offloaded) + 2 * COUNT == 16 * COUNT  # their host has the parameters too
    divided = {"zero": 2, "ranks": ranks} if ranks > 1 else {}
    _, device = estimate_zero2_model_states_mem_needs(COUNT, ranks, 1, cpu_offload=False)
    terms = by_name(SEVEN, Setup(dtype="bf16", **divided))
    assert sum(terms[name] for name in STATES) + 4 * COUNT / ranks == pytest.approx(device, rel=1e-6)
    if ranks > 1:
        largest = SEVEN.vocab * SEVEN.dim
        _, device, working = estimate_zero3_model_states_mem_needs(
            COUNT, largest, ranks, 1, cpu_offload=False, cpu_offload_params=False
        )
        terms = by_name(SEVEN, Setup(dtype="bf16", grad_dtype="fp32", zero=3, ranks=ranks))
        assert sum(terms[name] for name in STATES) == pytest.approx(device - working, rel=1e-6)
        assert terms["gathered parameters"] == 2 * 2 * counts.block_parameters(SEVEN)


# --- Tensor and pipeline parallelism, checkpointing


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("sequence", [False, True])
def test_a_layer_beside_megatrons(ranks, sequence):
    """Korthikanti et al. 2022 (arXiv:2205.05198), equations 2 and 4 with attention computed again: s·b·h·(10 + 24/t),
    or 34/t with sequence parallelism. Our layer has no dropout, so not its two masks (s·b·h each), and fp32 statistics:
    8 bytes a token and norm, 8 a token and head."""
    if sequence and ranks == 1:
        return
    shape = shape_of(presets.GPT["gpt2-xl"] | {"heads": 16})
    setup = Setup(dtype="bf16", batch=3, seq=1024, tp=ranks, sequence_parallel=sequence)
    tokens = setup.tokens
    theirs = activations.megatron_layer(1024, 3, shape.dim, shape.heads, ranks, sequence, selective=True)
    masks = 2 * tokens * shape.dim // (ranks if sequence else 1)
    statistics = tokens * 16 // (ranks if sequence else 1) + tokens * 8 * shape.heads // ranks
    (part,) = formulas.parts(shape, setup)
    assert activations.block(part, setup).bytes == theirs - masks + statistics


def test_selective_checkpointing_drops_the_matrices():
    """What Korthikanti et al. 2022 compute again: scores and probabilities; q, k, v and the result stay."""
    naive = Setup(dtype="bf16", attention="naive", batch=2, seq=512)
    shape = shape_of(presets.GPT["gpt2"])
    selective = Setup(dtype="bf16", attention="naive", batch=2, seq=512, checkpointing="selective")
    kept = activations.block_saved(shape, selective)
    assert not any("T×T" in name for name in kept)
    statistics = 8 * shape.heads * selective.tokens
    flash = activations.block(shape, Setup(dtype="bf16", batch=2, seq=512)).bytes
    assert activations.block(shape, selective).bytes == flash - statistics
    assert by_name(shape, selective)["activations"] < by_name(shape, naive)["activations"] / 3
    one_layers = activations.block(shape, naive).bytes - activations.block(shape, selective).bytes
    assert by_name(shape, selective)["step growth"] >= by_name(shape, selective)["activations"] + one_layers * 0.9


def test_the_models_of_the_megatron_paper():
    """Korthikanti et al. 2022, table 3 (heads, width, layers of 22, 175, 530 and 1,000 billion parameters; 2,048
    positions, 51,200 tokens), and the abstract's factor 5: what sequence parallelism and selective computation together
    keep of what tensor parallelism alone does."""
    rows = ((22, 64, 6144, 48), (175, 96, 12288, 96), (530, 128, 20480, 105), (1000, 160, 25600, 128))
    for billions, heads, width, layers in rows:
        config = {"vocab_size": 51200, "dim": width, "layers": layers, "heads": heads, "max_length": 2048}
        assert counts.parameters(shape_of(config)) / 1e9 == pytest.approx(billions, rel=0.015)
        both = activations.megatron_layer(2048, 1, width, heads, 8, sequence=True, selective=True)
        assert both / activations.megatron_layer(2048, 1, width, heads, 8) < 0.205


def test_gpt2_xl_of_the_zero_paper():
    """Rajbhandari et al. 2020, §1, §3.1: 1.5 billion parameters are 3 GB in 16 bits; training needs at least 24 GB."""
    shape = shape_of(presets.GPT["gpt2-xl"])
    terms = by_name(shape, Setup(dtype="fp16", seq=1024))
    assert terms["weights"] / 1e9 == pytest.approx(3, rel=0.05)
    assert sum(terms[name] for name in STATES) / 1e9 == pytest.approx(24, rel=0.05)


@pytest.mark.parametrize("name", ["llama-3-8b", "gpt2-xl", "smollm2-135m"])
def test_parts_are_the_whole(name):
    """Tensor parallelism repeats norms and some biases; pipeline stages add up to the model, a tied table twice."""
    shape = shape_of((presets.LLAMA | presets.GPT)[name])
    heads = {"llama-3-8b": 8, "gpt2-xl": 5, "smollm2-135m": 3}[name]
    (part,) = formulas.parts(shape, Setup(tp=heads))
    repeated = shape.layers * (2 * shape.dim if shape.family == "llama" else 6 * shape.dim)
    repeated += shape.dim if shape.family == "llama" else 2 * shape.dim + shape.max_length * shape.dim
    padded = (-shape.vocab % heads) * shape.dim * (1 if shape.tied else 2)
    assert heads * counts.parameters(part) == counts.parameters(shape) + (heads - 1) * repeated + padded
    first, last = formulas.parts(shape, Setup(pp=2))
    twice = shape.vocab * shape.dim if shape.tied else 0
    assert counts.parameters(first) + counts.parameters(last) == counts.parameters(shape) + twice


def test_a_pipelines_first_stage_holds_as_much_as_a_whole_model():
    """Korthikanti et al. 2022, §4.3: p micro-batches of L/p layers, so L layers' activations whatever p is."""
    shape = shape_of(presets.LLAMA["llama-13b"])
    for stages in (2, 4, 8):
        first, last = formulas.parts(shape, Setup(pp=stages))
        setup = Setup(dtype="bf16", pp=stages)
        whole = shape.layers * activations.block(shape, setup).bytes
        assert activations.activations(first, setup).bytes == pytest.approx(whole, rel=0.001)
        assert activations.activations(last, setup).bytes == pytest.approx(whole / stages, rel=0.05)
        assert predict(shape, setup)[-1].bytes == max(formulas.of_part(p, setup)[-1].bytes for p in (first, last))


def test_formulas_give_their_bytes():
    """Each printed formula, evaluated with the printed symbols, is the value next to it."""
    family = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True, "post_norms": True}
    config = {
        **presets.LLAMA["smollm2-135m"],
        **family,
        "activation": "gelu_tanh",
        "heads": 12,
        "kv_heads": 4,
        "head_dim": 64,
    }
    setups = [Setup(optimizer=name, dtype="bf16", seq=64, **more) for name in OPTIMIZERS if name != "none" for more in (
        {}, {"master": False}, {"lora_rank": 4}, {"grad_dtype": "fp32"}, {"offload": "parameters"},
        {"tp": 4}, {"tp": 4, "sequence_parallel": True}, {"pp": 4}, {"tp": 2, "pp": 3, "checkpointing": "block"},
    )]  # fmt: skip
    setups += [Setup(optimizer="muon", zero=2, ranks=3), Setup(attention="naive", packing=5, batch=3, seq=50)]
    setups += [Setup(tp=2, sequence_parallel=True, checkpointing="block", ranks=3, zero=3, dtype="bf16")]
    setups += [Setup(optimizer="none", kv_dtype=kind, dtype="fp16", tp=2, pp=2) for kind in ("fp32", "bf16", "fp8")]
    for shape in (shape_of(config), shape_of({**presets.GPT["gpt2"]})):
        for setup in setups:
            values = formulas.symbols(shape, setup)
            for term in predict(shape, setup)[:-1]:
                if term.name != "step growth":
                    text = re.sub(r"⌈(.+?)/(\w)⌉", r"-(-(\1)//\2)", term.formula).replace("·", "*")
                    assert eval(text, {"__builtins__": {}}, values) == term.bytes, (setup, term.name, term.formula)


def test_packed_rows():
    """Documents see themselves alone: of naive attention's matrices a row of 4 keeps a quarter; flash attention, which
    keeps none, nothing less. As a packed row of a model keeps them."""
    shape, naive = shape_of(LLAMA), {"seq": 200, "attention": "naive"}
    assert by_name(shape, Setup(seq=200)) == by_name(shape, Setup(seq=200, packing=4))
    whole, packed = (by_name(shape, Setup(**naive, packing=count))["activations"] for count in (1, 4))
    assert whole - packed == shape.layers * 200 * (8 * shape.heads + 1) * 150
    model = meters.build(LLAMA, Setup())
    rig = lab.Rig(LLAMA, shape, Setup(**naive))
    tokens, ends = torch.zeros(1, 200, dtype=torch.int64), torch.tensor([0, 50, 100, 150, 200])

    def loss():
        hidden = model(tokens, cu_seqlens=ends, hidden=True).flatten(0, 1)
        return ops.linear_cross_entropy(hidden, model.head_weight, tokens.flatten())

    with rig.attention():
        assert packed == pytest.approx(meters.saved_bytes(model, loss), rel=0.05)


# --- Published figures of inference and adapters


def test_kv_caches_as_published():
    """Kwon et al. 2023 (arXiv:2309.06180), §3: 800 KB a token of OPT-13B: 2 · 5,120 · 40 layers · 2 bytes. Llama-2-7B:
    0.5 MiB a token in 16 bits."""
    opt = shape_of({"vocab_size": 50272, "dim": 5120, "layers": 40, "heads": 40, "max_length": 2048})
    half = {"dtype": "fp16", "optimizer": "none", "seq": 1}
    assert states.kv_cache(opt, Setup(**half)).bytes == 800 * 1024
    seven = shape_of(presets.LLAMA["llama-2-7b"])
    assert states.kv_cache(seven, Setup(**half)).bytes == 512 * 1024
    assert states.kv_cache(seven, Setup(**half, kv_dtype="fp32")).bytes == 1024 * 1024
    assert states.kv_cache(seven, Setup(**half, kv_dtype="fp8")).bytes == (1 + 4 / 128) * 256 * 1024


def test_qlora_as_published():
    """Dettmers et al. 2023 (arXiv:2305.14314): double quantization takes 0.5 bits a parameter of constants to 0.127
    (§3); a 65B model that needs more than 780 GB in 16 bits trains in less than 48 GB (§1): 4-bit weights and adapters
    on all linear layers of rank 64 here, a row of 512 tokens, blocks computed again."""
    shape = shape_of(presets.LLAMA["llama-65b"])
    linears = shape.layers * counts.linear_weights(shape)
    for kind, bits in (("nf4", 4.5), ("nf4_double", 4.127)):
        stored = shape.layers * states.quantized_bytes(shape, Setup(optimizer="none", quantized=kind))
        assert 8 * stored / linears == pytest.approx(bits, abs=0.001)
    qlora = {"dtype": "bf16", "lora_rank": 64, "quantized": "nf4_double", "seq": 512, "checkpointing": "block"}
    assert predict(shape, Setup(**qlora, optimizer="adamw8bit"))[-1].bytes < 48e9
    assert a_parameter(shape, Setup(dtype="bf16"), *STATES) * counts.parameters(shape) > 780e9


def test_int8_halves_the_weights():
    """Dettmers et al. 2022 (arXiv:2208.07339): int8 inference halves the memory of 16-bit weights; of linear layers, to
    which it is applied."""
    half, eighth = (
        by_name(SEVEN, Setup(dtype="fp16", optimizer="none", quantized=kind))["weights"] for kind in ("none", "int8")
    )
    linears = SEVEN.layers * counts.linear_weights(SEVEN)
    assert half - eighth == pytest.approx(linears, rel=0.001)


def test_flash_attention_is_linear_in_the_length():
    """Dao et al. 2022 (arXiv:2205.14135), theorem 1: O(N) additional memory; standard attention O(N²)."""

    def saved(length, how):
        return activations.block(SEVEN, Setup(dtype="bf16", seq=length, attention=how)).bytes

    assert saved(4096, "flash") == 2 * saved(2048, "flash")
    growth = [saved(length, "naive") for length in (1024, 2048, 4096)]
    second = growth[2] - 2 * growth[1], growth[1] - 2 * growth[0]
    assert second[0] / second[1] == pytest.approx(4, rel=0.01)


# --- Settings that exclude each other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw9"}, "--optimizer adamw9 is none of adamw, .* did you mean"),
        ({"zero": 2}, "one rank has nothing to divide"),
        ({"zero": 1, "ranks": 4, "optimizer": "adafactor"}, "needs whole rows and columns"),
        ({"zero": 2, "ranks": 4, "pp": 2}, "take --zero 1"),
        ({"sequence_parallel": True}, "with --tp"),
        ({"sequence_parallel": True, "tp": 3, "seq": 100}, "cannot be divided by --tp 3"),
        ({"checkpointing": "selective"}, "--attention naive"),
        ({"grad_dtype": "bf16", "lora_rank": 4}, "adapters and virtual tokens are fp32"),
        ({"offload": "parameters", "ranks": 4}, "give --zero 3"),
        ({"algorithm": "ppo", "optimizer": "muon"}, "does not know muon"),
        ({"algorithm": "rlhf"}, "adapters on the same weights: give a --lora-rank"),
        ({"algorithm": "rlhf", "lora_rank": 4, "tp": 2}, "--algorithm rlhf: the formulas know it on one device"),
        ({"optimizer": "none", "lora_rank": 4}, "adapters are merged"),
        ({"optimizer": "none", "offload": "optimizer"}, "are for training"),
        ({"tp": 0}, "--tp 0 is too small"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        Setup(**settings)
    assert "\n" not in str(caught.value)
