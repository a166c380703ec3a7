"""Every family that a config.json can name: parameters as transformers counts them, formulas on live tensors."""

import pytest
import torch

from finetune import ops
from finetune.lm import head, presets
from finetune.lm.cache import KVCache
from finetune.lm.io.hf_llama import FAMILIES, read_config
from finetune.lm.llama import LlamaConfig
from finetune.memory import Setup, activations, counts, lab, meters, predict, shape_of

SIZES = {
    "vocab_size": 1000, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
BASE = {"vocab_size": 1000, "dim": 96, "layers": 4, "heads": 6, "kv_heads": 2, "hidden": 160, "max_length": 256}
GEMMA = {
    "head_dim": 24, "qk_norm": True, "window": 20, "window_layers": (0, 1, 2), "activation": "gelu_tanh",
    "norm_plus_one": True, "post_norms": True, "embedding_scale": 96**0.5, "local_rope_theta": 1e4,
}  # fmt: skip
KINDS = {
    "mistral": {"family": "mistral", "window": 20, "window_layers": (0, 1, 2, 3), "tied": False},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 32},
    "smollm3": {"family": "smollm3", "nope_layers": (3,)},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "tied": False},
    "gemma3": {"family": "gemma3_text", **GEMMA},
    "gemma2": {
        "family": "gemma2",
        **GEMMA,
        "qk_norm": False,
        "local_rope_theta": 0.0,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
    },
}
EACH_KIND = pytest.mark.parametrize("kind", list(KINDS))


def by_name(config, setup):
    return {term.name: term.bytes for term in predict(shape_of(config), setup)}


@pytest.mark.peer
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_parameters_beside_transformers(family, tied):
    """Of a model without storage, biases and norms in all families and ways that they can have them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    choices = [{}, {"head_dim": 40}]
    if family == "llama":
        choices += [{"attention_bias": True}, {"mlp_bias": True, "attention_bias": True}]
    if family in ("qwen3", "smollm3"):
        choices.append({"attention_bias": True})
    for more in choices:
        if family in ("qwen2", "smollm3") and "head_dim" in more:
            continue
        config = AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied, **more)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        want = sum(p.numel() for p in model.parameters())
        assert counts.parameters(shape_of(read_config(config.to_dict(), family))) == want, more


@pytest.mark.peer
def test_parameters_of_gpt2_beside_transformers():
    from transformers import AutoModelForCausalLM, GPT2Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            GPT2Config(n_embd=96, n_layer=3, n_head=6, n_inner=200, vocab_size=500, bos_token_id=1, eos_token_id=2)
        )
    shape = {"vocab_size": 500, "dim": 96, "layers": 3, "heads": 6, "hidden": 200, "max_length": 1024}
    assert counts.parameters(shape_of(shape)) == sum(p.numel() for p in model.parameters())


def test_parameters_as_published():
    """The checkpoints' exact counts, in their model cards' metadata on the hub."""
    published = {
        "llama-3.2-1b": 1_235_814_400,
        "mistral-7b": 7_241_732_096,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-0.6b": 596_049_920,
        "gemma-3-1b": 999_885_952,
    }
    for name, count in published.items():
        assert counts.parameters(shape_of(presets.LLAMA[name])) == count, name


@EACH_KIND
@pytest.mark.parametrize(
    "setup",
    [
        Setup(batch=2, seq=100),
        Setup(batch=2, seq=100, dtype="bf16"),
        Setup(batch=1, seq=200, lora_rank=4, dtype="bf16"),
        Setup(batch=1, seq=200, lora_rank=4, lora_targets="q,v", quantized="nf4"),
        Setup(batch=1, seq=200, checkpointing="block", optimizer="adamw8bit"),
    ],
    ids=("full", "bf16", "lora", "qlora", "checkpointing"),
)
def test_a_family(kind, setup):
    """Weights, gradients and states to the byte, activations within 5 %."""
    config = LlamaConfig(**(BASE | KINDS[kind]))
    terms = dict.fromkeys(("weights", "gradients", "optimizer states", "activations"), 0)
    predicted = by_name(config, setup)
    rig = lab.Rig(config, shape_of(config), setup)
    for name in terms:
        found = lab.METERS[name](rig)
        assert predicted[name] == (pytest.approx(found, rel=0.05) if name == "activations" else found), name


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_a_block_to_the_byte(kind):
    """What a further block keeps, but for Gemma's sums of weight and 1, which do not grow with the tokens."""
    config = LlamaConfig(**(BASE | KINDS[kind]))
    shape = shape_of(config)
    for dtype in ("fp32", "bf16"):
        found = [
            lab.one_block(lab.Rig(config, shape, Setup(batch=1, seq=tokens, dtype=dtype))) for tokens in (100, 200)
        ]
        want = [activations.block(shape, Setup(batch=1, seq=tokens, dtype=dtype)).bytes for tokens in (100, 200)]
        assert found[1] - found[0] == want[1] - want[0]


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_the_cache_keeps_all_tokens(kind):
    """Layers with a window of 20 too: `source` says so."""
    config = LlamaConfig(**(BASE | KINDS[kind]))
    model = meters.build(config, Setup())
    setup = Setup(batch=3, seq=70, optimizer="none")
    term = next(term for term in predict(shape_of(config), setup) if term.name == "KV cache")
    assert term.bytes == KVCache(model, 3, 70).nbytes
    assert "window" in term.source


def test_flash_attention_with_a_window_keeps_no_matrix():
    config = LlamaConfig(**(BASE | KINDS["mistral"] | {"max_length": 1024}))
    model = meters.build(config, Setup())

    def saved(length):
        tokens = torch.zeros(1, length, dtype=torch.int64)
        return meters.saved_bytes(
            model,
            lambda: ops.linear_cross_entropy(
                model(tokens, hidden=True).flatten(0, 1), model.head_weight, tokens.flatten()
            ),
        )

    assert saved(1024) < 2.05 * saved(512)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_naive_attention_of_a_family(kind):
    """Windows are masks of the same size; a soft cap keeps a further matrix."""
    config, setup = LlamaConfig(**(BASE | KINDS[kind])), Setup(batch=2, seq=128, attention="naive")
    found = lab.activations(lab.Rig(config, shape_of(config), setup))
    assert by_name(config, setup)["activations"] == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("tokens", [700, 2500])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_loss_of_capped_logits(tokens, dtype):
    config = LlamaConfig(**(BASE | KINDS["gemma2"] | {"vocab_size": 20_000, "layers": 3, "max_length": 4096}))
    setup = Setup(seq=tokens, dtype=dtype)
    found = lab.logits(lab.Rig(config, shape_of(config), setup))
    assert by_name(config, setup)["logits"] == pytest.approx(found, rel=0.05)
    assert activations.CAPPED_CHUNK == head.CHUNK


def test_simulated_as_predicted():
    from finetune.memory.simulate import simulate

    config = {**BASE, "rope_theta": 1e4, **KINDS["gemma3"]}
    setup = Setup(batch=1, seq=128, dtype="bf16", zero=2, ranks=4)
    for term, found in simulate(config, setup).items():
        assert by_name(config, setup)[term] == pytest.approx(found, rel=0.05), term
