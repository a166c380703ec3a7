"""What is trained next to adapters: whole modules, and an adapter of the head, against live tensors."""

import json
from math import prod

import pytest

from finetune.errors import UserError
from finetune.lm.gpt import GPTConfig
from finetune.lm.llama import LlamaConfig
from finetune.memory import Setup, counts, formulas, lab, meters, models, predict, search, shape_of
from finetune.memory.possible import check_shape

SIZES = {"vocab_size": 1000, "dim": 96, "layers": 3, "heads": 6, "kv_heads": 2, "hidden": 160, "max_length": 256}
TIED, APART = LlamaConfig(**SIZES), LlamaConfig(**SIZES, tied=False)
QWEN = LlamaConfig(**SIZES, qkv_bias=True, qk_norm=True, tied=False)
GEMMA2 = LlamaConfig(**SIZES, tied=False, logit_softcap=30.0)
LORA = {"batch": 1, "seq": 200, "lora_rank": 4}
TERMS = ("weights", "gradients", "optimizer states", "activations")
CASES = [
    (TIED, {"whole": "embed_tokens", "lora_targets": "q,v"}),
    (TIED, {"whole": "lm_head,norm", "dtype": "bf16"}),
    (TIED, {"whole": "embed", "untied": True, "dtype": "bf16"}),
    (TIED, {"whole": "lm_head", "untied": True, "optimizer": "adamw8bit"}),
    (TIED, {"whole": "embed,head", "untied": True}),
    (TIED, {"lora_targets": "q,lm_head"}),
    (TIED, {"lora_targets": "all,head", "whole": "embed_tokens", "dtype": "bf16"}),
    (APART, {"whole": "embed_tokens,lm_head", "dtype": "bf16", "checkpointing": "block"}),
    (APART, {"whole": "head", "quantized": "nf4_double", "optimizer": "adamw8bit", "dtype": "bf16"}),
    (APART, {"lora_targets": "head", "adapter": "dora"}),
    (APART, {"lora_targets": "v,head", "adapter": "dora", "dtype": "bf16", "optimizer": "adamw8bit"}),
    (APART, {"lora_targets": "head", "whole": "norm"}),
    (APART, {"lora_targets": "o,head", "adapter": "pissa"}),
    (QWEN, {"lora_targets": "v", "whole": r"q_proj,k_norm,blocks\.1\.mlp_norm,input_layernorm", "optimizer": "muon"}),
    (QWEN, {"lora_targets": "down,head", "whole": "embed", "optimizer": "adafactor"}),
    (QWEN, {"lora_targets": "down", "whole": "post_attention_layernorm,up", "optimizer": "sgd_momentum"}),
]


def short(value):
    return "-".join(str(each) for each in value.values()) if isinstance(value, dict) else ("tied" if value.tied else "")


EACH = pytest.mark.parametrize(("config", "changes"), CASES, ids=short)


def by_name(config, setup):
    return {term.name: term.bytes for term in predict(shape_of(config), setup)}


@EACH
def test_live_tensors(config, changes):
    """Weights, gradients and states to the byte; activations within 5 %."""
    setup = Setup(**(LORA | changes))
    rig, predicted = lab.Rig(config, shape_of(config), setup), by_name(config, setup)
    for name in TERMS:
        found = lab.METERS[name](rig)
        assert found > 0
        assert predicted[name] == (pytest.approx(found, rel=0.05) if name == "activations" else found), name


@EACH
def test_formulas_give_their_bytes(config, changes):
    setup, shape = Setup(**(LORA | changes)), shape_of(config)
    values = formulas.symbols(shape, setup)
    for term in predict(shape, setup)[:-1]:
        if term.name != "step growth":
            text = term.formula.replace("·", "*")
            assert eval(text, {"__builtins__": {}}, values) == term.bytes, (term.name, term.formula)
    tensors = counts.trained_tensors(shape, setup)
    assert sum(count * prod(size) for count, size, _ in tensors) == counts.trained(shape, setup)[0] + values["w"]


@pytest.mark.parametrize(
    "changes", [{"whole": "head"}, {"lora_targets": "q,head"}, {"lora_targets": "q,head", "dtype": "bf16"}], ids=short
)
@pytest.mark.parametrize("loss", ["chunked", "logprobs"])
@pytest.mark.parametrize("config", [APART, GEMMA2], ids=("plain", "capped"))
def test_the_loss(config, loss, changes):
    """Makes the head's gradient where the head learns, also as W + s B A."""
    config = LlamaConfig(**{**vars(config), "vocab_size": 20_000, "layers": 1, "max_length": 1024})
    setup = Setup(**(LORA | {"seq": 900, "loss": loss} | changes))
    found = lab.logits(lab.Rig(config, shape_of(config), setup))
    assert by_name(config, setup)["logits"] == pytest.approx(found, rel=0.05)
    frozen = Setup(**LORA | {"seq": 900, "loss": loss, "dtype": setup.dtype})
    assert by_name(config, frozen)["logits"] < by_name(config, setup)["logits"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "changes", [{"whole": "embed,head"}, {"lora_targets": "q,head"}, {"lora_targets": "q,head", "adapter": "dora"}]
)
def test_the_peak_of_a_step(tied, changes, dtype):
    """What a forward and backward pass have allocated at once, of few tokens, where tables are most of it."""
    config = LlamaConfig(**{**SIZES, "vocab_size": 8000, "dim": 192, "tied": tied})
    setup = Setup(**(LORA | changes | {"seq": 16, "dtype": dtype}))
    rig = lab.Rig(config, shape_of(config), setup)
    assert rig.model is not None
    found = meters.peak_allocated(lambda: rig.loss(rig.tokens(1, 16)).backward())
    assert by_name(config, setup)["step growth"] == pytest.approx(found, rel=0.05)


def test_what_it_adds(capsys, monkeypatch):
    """To LoRA of SmolLM2-135M in bf16: a table of 49,152 × 576, in bytes of weight, gradient, and moments with master;
    the search's command for sft has it too."""
    from finetune.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    words = ["memory", "smollm2", "--dtype", "bf16", "--lora-rank", "8", "--seq", "256"]
    found = []
    for more in ([], ["--whole", "embed_tokens"]):
        assert main([*words, *more, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        found.append({term["name"]: term["bytes"] for term in told["terms"]})
    plain, whole = found
    assert [(whole[name] - plain[name]) / (49_152 * 576) for name in TERMS[:3]] == [2, 2, 12]
    assert "--lora-rank 0" in told["instead"]
    assert main([*words, "--whole", "embed_tokens"]) == 0
    assert "LoRA of rank 8 and embed_tokens whole" in capsys.readouterr().out
    setup = Setup(dtype="bf16", lora_rank=8, lora_targets="all,head", whole="norm", seq=256)
    line = search.command(models.named("smollm2"), setup, set())
    assert "--targets all-linear,head --modules-to-save norm --dtype" in line


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (APART, {"lora_rank": 0, "whole": "embed"}, "--whole: .* give a --lora-rank"),
        (APART, {"untied": True}, "--untied is for --whole"),
        (APART, {"untied": True, "whole": "embed"}, "two tables already"),
        (APART, {"whole": "embed", "tp": 2}, "--whole: .* omit --tp"),
        (APART, {"lora_targets": "lm_head", "zero": 1, "ranks": 2}, "--lora-targets head: .* omit --zero"),
        (APART, {"whole": "embed", "optimizer": "muon", "master": False, "dtype": "bf16"}, "--no-master"),
        (APART, {"whole": "embed_token"}, "'embed_token' cannot be trained whole.* did you mean 'embed_tokens'"),
        (APART, {"whole": "q", "quantized": "nf4"}, "'q' cannot be trained whole"),
        (TIED, {"whole": "lm_head", "lora_targets": "head"}, "'lm_head' cannot be trained whole"),
        (GPTConfig(vocab_size=99, dim=96, layers=1, heads=6, max_length=256), {"whole": "embed"}, "modules of a gpt"),
        (GPTConfig(vocab_size=99, dim=96, layers=1, heads=6, max_length=256), {"lora_targets": "head"}, "'head'; it "),
        (APART, {"lora_rank": 97, "lora_targets": "head"}, "layer head of m has 96 inputs and 1,000 outputs"),
    ],
)
def test_impossible(config, changes, message):
    def ask():
        setup = Setup(**(LORA | changes))
        check_shape("m", shape_of(config), setup)
        predict(shape_of(config), setup)

    with pytest.raises(UserError, match=message) as caught:
        ask()
    assert "\n" not in str(caught.value)
