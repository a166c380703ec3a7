"""Adapters of other families than Llama: made by peft, read here, saved again, merged, and over quantized weights."""

import pytest
import torch
from small_adapters import TOKENS

from finetune.lm.io import load, save
from finetune.peft import lora
from finetune.peft.adapters import load_adapter, save_adapter
from finetune.peft.quantize import quantize_linears

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
         "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip


def near(mine, theirs):
    return (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.peer
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Gemma3"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "use_dora": True, "modules_to_save": ["norm", "post_attention_layernorm"]},
        {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    ],
    ids=["norms", "biases"],
)
def test_an_adapter_of_the_family(tmp_path, family, settings):
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))(**SHAPE)
    kind = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    made = kind(config)
    for p in made.parameters():
        p.data += 0.1 * torch.randn_like(p)  # biases and norms too
    made.save_pretrained(tmp_path / "base")
    theirs = get_peft_model(kind.from_pretrained(tmp_path / "base"), LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    for p in theirs.eval().parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "adapter")
    want = theirs(TOKENS).logits
    model = load.llama(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    assert near(model(TOKENS), want)
    save_adapter(model, tmp_path / "again", str(tmp_path / "base"))
    again = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "again").eval()
    assert near(again(TOKENS).logits, want)
    lora.merge(model)
    save.model(model, tmp_path / "merged")
    assert near(kind.from_pretrained(tmp_path / "merged")(TOKENS).logits, want)
    coarse = load.llama(tmp_path / "base")
    quantize_linears(coarse, "nf4")
    load_adapter(coarse, tmp_path / "adapter")
    want = coarse(TOKENS)
    lora.merge(coarse)
    assert near(coarse(TOKENS), want)
