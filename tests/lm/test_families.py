"""Each family and each kind of scaled rotary embedding: tiny random folders of transformers, read, computed, decoded,
adapted and written again."""

import copy
import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch

from finetune.errors import UserError
from finetune.inference.generate import generate
from finetune.lm import head, presets
from finetune.lm.cache import KVCache
from finetune.lm.io import load, save
from finetune.lm.io.hf_llama import FAMILIES, hf_tensors, read_config, to_hf, write_config
from finetune.lm.layers import rope_frequencies
from finetune.lm.llama import Llama, LlamaConfig
from finetune.peft.adapters import load_adapter, save_adapter, save_prompt
from finetune.peft.lora import apply_lora, train_modules
from finetune.peft.quantize import quantize_linears
from finetune.peft.virtual_tokens import Prefix, Prompt

peer = pytest.mark.peer
LENGTH = 24  # tokens of a row: more than every window, and than the length before scaling

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": ("llama", {"rms_norm_eps": 1e-5}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": True}),
    "llama3 rope": (
        "llama",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8, "rope_theta": 5e2}},
    ),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}),
    "dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}, "max_position_embeddings": 8},
    ),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral without a window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen2 yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "rope_theta": 1e4,
                "beta_fast": 4.0,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 yarn": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "rope_theta": 1e6,
                "mscale": 0.7,
                "mscale_all_dim": 0.3,
                "truncate": False,
            },
        },
    ),
    "smollm3": ("smollm3", {}),
    "smollm3 windows": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [1, 0, 1, 0], "attention_bias": True},
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "sliding_window_pattern": 3},
    ),
    "gemma3 linear": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
            },
        },
    ),
}
ROOT = tempfile.TemporaryDirectory(prefix="families")  # removed when the process ends
every = pytest.mark.parametrize("case", CASES)


@functools.cache
def folder(case):
    """A folder that transformers saved: all its parameters random, norms and biases too."""
    import transformers

    name, changes = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **(SIZES | changes))
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    path = Path(ROOT.name) / case
    made.save_pretrained(path)
    return path


def theirs(path, dtype=torch.float32):
    """transformers' model of a folder. Never one twice: its dynamic scaling remembers the longest sequence."""
    import transformers

    kinds = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, **kinds)
    assert not any(info.values()), info
    return model


@functools.cache
def ours(case):
    return load.llama(folder(case))


def near(mine, wanted, bound=1e-5):
    return (mine - wanted).abs().max() <= bound * wanted.abs().max()


def tokens(*shape, seed=0):
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@peer
@every
def test_logits_and_gradients_equal_transformers(case):
    mine, other = copy.deepcopy(ours(case)), theirs(folder(case))
    rows = tokens(2, LENGTH)
    logits, wanted = mine(rows), other(rows).logits
    assert near(logits, wanted)
    logits.sin().sum().backward()
    wanted.sin().sum().backward()
    grads = {name: parameter.grad for name, parameter in other.named_parameters()}
    largest = max(grad.abs().max() for grad in grads.values())  # some are exactly 0: a key's bias without rotation
    for name, parameter in mine.named_parameters():
        grad = grads[to_hf(name, mine.config.post_norms)]
        assert (parameter.grad - grad).abs().max() <= 1e-5 * max(grad.abs().max(), largest / 100), name


@peer
@every
@torch.no_grad()
def test_packed_and_padded_rows_equal_transformers(case):
    model, sizes = ours(case), [20, 3, 14]
    row = tokens(1, sum(sizes))
    places = torch.cat([torch.arange(n) for n in sizes])[None]
    packed = model(row, cu_seqlens=torch.tensor([0, *sizes]).cumsum(0))
    assert near(packed, theirs(folder(case))(row, position_ids=places, use_cache=False).logits)
    rows, lengths = tokens(3, LENGTH), torch.tensor([LENGTH, 7, 15])
    real = torch.arange(LENGTH) < lengths[:, None]
    wanted = theirs(folder(case))(rows, attention_mask=real.long()).logits
    assert near(model(rows, lengths=lengths)[real], wanted[real])


@peer
@pytest.mark.parametrize("case", [case for case in CASES if case != "dynamic rope"])
@torch.no_grad()
def test_decoding_equals_the_full_pass(case):
    """Rows of unequal lengths that grow beyond the window and beyond the length before scaling. (With dynamic scaling
    what is in the cache was made with another theta.)"""
    model, rows, lengths = ours(case), tokens(3, LENGTH), torch.tensor([5, 11, 2])
    cache = KVCache(model, 3, LENGTH)
    logits = model(rows[:, : lengths.max()], lengths=lengths, cache=cache)[torch.arange(3), lengths - 1]
    for _ in range(LENGTH - int(lengths.max())):
        full = model(rows[:, : lengths.max()], lengths=lengths)[torch.arange(3), lengths - 1]
        assert near(logits, full)
        logits = model(rows[torch.arange(3), lengths][:, None], cache=cache)[:, 0]
        lengths = lengths + 1


@peer
@torch.no_grad()
def test_dynamic_decoding_equals_transformers():
    """The prompt has fewer tokens than the length before scaling, the answer goes beyond."""
    model, other, row = ours("dynamic rope"), theirs(folder("dynamic rope")), tokens(1, LENGTH)
    assert model.config.max_length == LENGTH
    cache, past = KVCache(model, 1, LENGTH), None
    for part in row.split([6, *[1] * (LENGTH - 6)], 1):
        step = other(part, cache=past, use_cache=True)
        past = step.cache
        assert near(model(part, cache=cache), step.logits)


@peer
@every
@torch.no_grad()
def test_saved_folders_open_in_transformers(case, tmp_path):
    model, rows = ours(case), tokens(2, LENGTH)
    save.model(model, tmp_path)
    assert near(theirs(tmp_path)(rows).logits, model(rows))
    assert load.config(tmp_path) == model.config


@peer
@pytest.mark.parametrize(
    "case", ["mistral", "dynamic rope", "qwen2 windows", "qwen3 yarn", "smollm3", "gemma2", "gemma3"]
)
def test_generated_tokens_are_those_of_transformers(case):
    prompt = tokens(1, 4, seed=3)
    wanted = theirs(folder(case)).generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert generate(ours(case), prompt, 12) == wanted[:, 4:].tolist()


@peer
@pytest.mark.parametrize("case", ["llama biases", "qwen2", "gemma3"])
@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_learn_and_open_in_peft(case, quantized, tmp_path):
    from peft import PeftModel

    model, rows = copy.deepcopy(ours(case)), tokens(4, 16, seed=2)
    if quantized:
        quantize_linears(model, "int8")
    parameters = apply_lora(model, 4, 8.0, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    save_adapter(model, tmp_path)
    again = copy.deepcopy(ours(case))
    load_adapter(again, tmp_path)
    opened = PeftModel.from_pretrained(theirs(folder(case)), tmp_path)
    with torch.no_grad():
        assert near(again(rows), opened(rows).logits)
        assert near(model(rows), again(rows), 0.1 if quantized else 1e-5)


@peer
@pytest.mark.parametrize("case", ["mistral", "qwen2", "qwen3", "smollm3 windows", "gemma3"])
@pytest.mark.parametrize("kind", [Prompt, Prefix])
@torch.no_grad()
def test_virtual_tokens_equal_peft(case, kind, tmp_path):
    """Longer together with the row than a window; embeddings are scaled where the family's are."""
    from peft import PeftModel

    part, row = kind.from_tokens(ours(case), torch.arange(7)), tokens(1, 13)
    save_prompt(ours(case), part, tmp_path)
    opened = PeftModel.from_pretrained(theirs(folder(case)), tmp_path)
    wanted = opened(row, attention_mask=torch.ones_like(row)).logits[:, -13:]
    assert near(part(ours(case), row), wanted)


@peer
@torch.no_grad()
def test_a_scaled_embedding_that_an_adapter_holds(tmp_path):
    from peft import PeftModel

    model, row = copy.deepcopy(ours("gemma3")), tokens(1, 13)
    apply_lora(model, 2)
    for parameter in train_modules(model, ["embed", "mlp_norm", "attn_post_norm"]):
        parameter.mul_(1.5)
    save_adapter(model, tmp_path)
    assert near(model(row), PeftModel.from_pretrained(theirs(folder("gemma3")), tmp_path)(row).logits)


@peer
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_capped_logits(monkeypatch, reduction):
    """In chunks of three rows; some targets are ignored, of rows that hold NaN."""
    model, row, targets = copy.deepcopy(ours("gemma2")), tokens(1, LENGTH), tokens(LENGTH, seed=4)
    targets[::5] = -100
    monkeypatch.setattr(head, "CHUNK", 3 * 61)
    state = model(row, hidden=True)[0].detach().requires_grad_()
    rows = state.masked_fill((targets == -100)[:, None], torch.nan)
    wanted = torch.nn.functional.cross_entropy(head.logits(model, state), targets, reduction=reduction)
    got = head.cross_entropy(model, rows, targets, reduction)
    assert torch.allclose(got, wanted)
    inputs = state, model.embed.weight
    for mine, grad in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert near(mine, grad)
    assert head.cross_entropy(model, rows, torch.full_like(targets, -100), reduction) == 0


@peer
def test_checkpointing_and_the_compiler_change_nothing():
    model, rows = copy.deepcopy(ours("gemma3")), tokens(2, LENGTH)
    plain = torch.autograd.grad(model(rows).sin().sum(), list(model.parameters()))
    model.gradient_checkpointing = True
    for mine, wanted in zip(torch.autograd.grad(model(rows).sin().sum(), list(model.parameters())), plain, strict=True):
        assert torch.equal(mine, wanted)
    model.gradient_checkpointing = False
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert near(compiled(rows), model(rows))


@peer
@pytest.mark.parametrize("case", ["qwen2", "qwen3", "gemma3"])
@torch.no_grad()
def test_bf16_errs_no_more_than_transformers(case):
    """Both against the fp32 model of the same rounded weights."""
    rows = tokens(4, LENGTH)
    mine, other = load.llama(folder(case), torch.bfloat16), theirs(folder(case), torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in mine.parameters())
    exact = copy.deepcopy(mine).float()(rows)
    errors = [(logits.float() - exact).square().mean().sqrt() for logits in (mine(rows), other(rows).logits)]
    assert errors[0] <= 1.2 * errors[1]


# --- configurations

# The keys of published config.json files that concern the shape, as transformers 4 wrote them.
FILES = {
    "llama-3.2-1b": """{"model_type": "llama", "attention_bias": false, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "vocab_size": 128256}""",
    "mistral-7b": """{"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "vocab_size": 32000}""",
    "qwen2.5-0.5b": """{"model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": true, "use_mrope": false, "use_sliding_window": false,
        "vocab_size": 151936}""",
    "qwen3-0.6b": """{"model_type": "qwen3", "attention_bias": false, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "smollm3-3b": """{"model_type": "smollm3", "attention_bias": false, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 11008, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": false,
        "no_rope_layer_interval": 4, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 5000000.0,
        "sliding_window": null, "use_sliding_window": false, "vocab_size": 128256}""",
    "gemma-2-2b": """{"model_type": "gemma2", "attention_bias": false, "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "vocab_size": 256000}""",
    "gemma-3-1b": """{"model_type": "gemma3_text", "attention_bias": false, "attn_logit_softcapping": null,
        "cache_implementation": "hybrid", "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144}""",
}
BASE = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 4096}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_published_configurations(name):
    config = read_config(json.loads(FILES[name]), "config.json")
    assert config == LlamaConfig(**presets.LLAMA[name])
    assert read_config(json.loads(json.dumps(write_config(config, torch.bfloat16))), "again") == config


def test_values_of_a_family_that_its_files_omit():
    def read(name, **changes):
        return read_config(BASE | {"model_type": name} | changes, "config.json")

    assert read("mistral", num_attention_heads=8).kv_heads == 8
    assert read("mistral", num_key_value_heads=2).window == 4096
    assert read("mistral", num_key_value_heads=2, sliding_window=None).window_layers == ()
    assert read("qwen3", num_key_value_heads=2).head_dim == 128
    assert read("qwen2", num_key_value_heads=2, sliding_window=64).window == 0
    assert read("smollm3").nope_layers == (3,)
    assert read("smollm3").tied
    assert read("smollm3").rope_theta == 2e6


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gemma3"}, "gemma3.*vision"),
        ({"model_type": "phi3"}, f"phi3.*supported are {', '.join(FAMILIES)}"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"attention_multiplier": 0.5}, "attention_multiplier"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "rope_scaling of type 'longrope'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters of type 'proportional'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor is -2"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "low_freq_factor < high_freq_factor"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "contradict"),
        ({"model_type": "qwen2", "use_mrope": True}, "use_mrope"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 3}, "layer_types names 3 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4}, "sliding_window"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "gemma3_text", "hidden_activation": "relu"}, "hidden_activation"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(reversed(value)),
)
def test_what_is_not_supported_is_named(changes, match):
    with pytest.raises(UserError, match=match) as caught:
        read_config(BASE | {"num_key_value_heads": 2} | changes, "config.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json")


def test_a_model_that_its_family_has_no_keys_for_is_not_saved(tmp_path):
    shape = {"vocab_size": 16, "dim": 8, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 8}
    for change in ({"qk_norm": True}, {"qkv_bias": True}, {"window": 4, "window_layers": (1,)}, {"nope_layers": (0,)}):
        with pytest.raises(UserError, match=f"a llama model cannot be saved with {next(iter(change))}"):
            save.model(Llama(LlamaConfig(**shape, **change)), tmp_path / "m")
        assert not (tmp_path / "m").exists()
    for change in ({"window_layers": (1,)}, {"nope_layers": (2,)}, {"activation": "relu"}):
        with pytest.raises(UserError):
            LlamaConfig(**shape, **change)


@peer
@pytest.mark.parametrize(
    ("head_dim", "theta", "rope"),
    [
        (128, 5e5, LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}),
        (64, 5e5, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}),
        (128, 1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
        (128, 1e4, {"rope_type": "linear", "factor": 3.0}),
    ],
    ids=["Llama 3.1", "Llama 3.2", "Qwen2.5", "linear"],
)
def test_frequencies_of_published_models_are_transformers_bit_for_bit(head_dim, theta, rope):
    """An angle is position times frequency: at 100,000 tokens a rounding error is large."""
    from transformers import LlamaConfig as Theirs
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = BASE | {"head_dim": head_dim, "max_position_embeddings": 131072}
    other = Theirs(**raw, rope_parameters=rope | {"rope_theta": theta})
    wanted, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](other, None)
    mine = read_config(raw | {"rope_theta": theta, "rope_scaling": rope}, "config.json")
    assert torch.equal(rope_frequencies(head_dim, theta, mine.rope_scaling), wanted)
    assert mine.rope_scaling.magnitude == magnitude
    assert json.loads(json.dumps(write_config(mine, torch.float32)))["rope_scaling"]["factor"] == rope["factor"]


# --- shapes of published models

PUBLISHED = {  # the numbers of parameters that the models' hub pages state for their safetensors, a shared table once
    "llama-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    with torch.device("meta"):
        model = Llama(LlamaConfig(**presets.LLAMA[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@peer
@pytest.mark.parametrize("name", [name for name in PUBLISHED if presets.LLAMA[name].get("family")])
def test_their_tensors_are_those_of_transformers(name):
    import transformers

    with torch.device("meta"):
        mine = Llama(LlamaConfig(**presets.LLAMA[name]))
        raw = write_config(mine.config, torch.float32)
        other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    assert {at: tensor.shape for at, tensor in hf_tensors(mine)} == {
        at: tensor.shape for at, tensor in other.named_parameters()
    }
