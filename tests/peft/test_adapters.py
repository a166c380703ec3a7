"""Adapter folders in peft's format: round trips, what peft opens, what peft made, and what cannot be loaded."""

import copy
import json

import pytest
import torch
from small_adapters import TOKENS, shake, small_model

from finetune.errors import UserError
from finetune.lm.io import save
from finetune.lm.llama import Llama, LlamaConfig
from finetune.peft.adapters import load_adapter, load_prompt, save_adapter, save_prompt
from finetune.peft.lora import adapters, apply_lora, merge
from finetune.peft.virtual_tokens import Prefix, Prompt

VARIANTS = {
    "lora": {},
    "some layers": {"targets": ("blocks.1.attn.q", "mlp.down")},
    "patterns": {"rank_pattern": {"q": 2, r"0\.mlp\.up": 6}, "alpha_pattern": {"down": 3.0}},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"pissa": True},
}
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def model():
    return small_model()


def near(mine, theirs):
    return (mine - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@EACH_VARIANT
def test_round_trip(model, tmp_path, variant):
    base = copy.deepcopy(model)
    apply_lora(model, 3, 7, **VARIANTS[variant])
    shake(model)
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path, "again")
    assert near(base(TOKENS), model(TOKENS))
    assert not [f.name for f in tmp_path.iterdir() if "tmp" in f.name]


@pytest.mark.parametrize("kind", [Prompt, Prefix])
def test_round_trip_of_prompts(model, tmp_path, kind):
    part = kind.from_tokens(model, torch.arange(5))
    save_prompt(model, part, tmp_path)
    assert torch.equal(load_prompt(model, tmp_path)(model, TOKENS), part(model, TOKENS))
    with pytest.raises(UserError, match="peft_type"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "olora"}, "'olora' changed the base weights"),
        ({"lora_alpha": "16"}, "lora_alpha is '16': expected `float`"),
        ({"lora_alpha": -16.0}, "lora_alpha is -16.0"),
        ({"lora_alpha": 1e999}, "lora_alpha is .*not a finite|not JSON|out of range"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"r": -1}, "r is -1"),
        ({"r": 1 << 40}, "r is 1099511627776"),
        ({"rank_pattern": {"q_proj": 1 << 15}}, "lora_A of blocks.0.attn.q is .3, 32. instead of .32768, …."),
        ({"use_dora": "yes"}, "use_dora is 'yes'"),
        ({"alpha_pattern": [1]}, "alpha_pattern is .1.: expected `object"),
        ({"use_dora": True}, "magnitude of blocks.* is missing"),
        ({"bias": "some"}, "bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names .lm_head., of which the folder holds no weights"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 5}, "lora_A of blocks.0"),
        ({"r": None}, "r is None: expected `int`"),
    ],
)
def test_adapters_that_cannot_be_loaded(model, tmp_path, change, message):
    base = copy.deepcopy(model)
    apply_lora(model, rank=3, alpha=7)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)


def test_damaged_and_foreign_adapters(model, tmp_path):
    base = copy.deepcopy(model)
    small = Llama(LlamaConfig(vocab_size=50, dim=32, layers=1, heads=4, kv_heads=2, hidden=48, max_length=64))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter(base, tmp_path)
    with pytest.raises(UserError, match="no adapter"):
        save_adapter(model, tmp_path)
    apply_lora(model, rank=3, alpha=7)
    save_adapter(model, tmp_path)
    with pytest.raises(UserError, match=r"layer blocks\.1\."):
        load_adapter(small, tmp_path)
    next(adapters(model))[1].part("default").lora_A.data[0, 0] = torch.nan
    save_adapter(model, tmp_path / "nan")
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight holds NaN"):
        load_adapter(base, tmp_path / "nan")
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        load_adapter(base, tmp_path)


# --- peft


def theirs_of(folder, adapter=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    return base if adapter is None else PeftModel.from_pretrained(base, adapter).eval()


@pytest.mark.peer
@EACH_VARIANT
def test_peft_opens_our_adapter(model, tmp_path, variant):
    """And merging gives the same in peft, here, and in transformers after our save."""
    save.model(model, tmp_path / "base")
    apply_lora(model, 4, 8, **VARIANTS[variant])
    shake(model)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = theirs_of(tmp_path / "base", tmp_path / "adapter")
    want = theirs(TOKENS).logits
    assert near(model(TOKENS), want)
    assert sum(".lora_A." in name for name, _ in theirs.named_parameters()) == len(dict(adapters(model)))
    merge(model)
    assert near(model(TOKENS), want)
    assert near(theirs.merge_and_unload()(TOKENS).logits, want)
    save.model(model, tmp_path / "merged")
    assert near(theirs_of(tmp_path / "merged")(TOKENS).logits, model(TOKENS))


THEIRS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "patterns": {"rank_pattern": {"q_proj": 2, "model.layers.0.mlp.*": 6}, "alpha_pattern": {"layers.1.*": 3}},
}


@pytest.mark.peer
@pytest.mark.parametrize("variant", THEIRS)
def test_an_adapter_made_by_peft_loads(model, tmp_path, variant):
    from peft import LoraConfig, get_peft_model

    save.model(model, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **THEIRS[variant])
    torch.manual_seed(0)
    theirs = get_peft_model(theirs_of(tmp_path / "base"), config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.mul_(1 + 0.1 * torch.rand_like(p)).add_(torch.randn_like(p) * 0.02)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    assert near(model(TOKENS), theirs(TOKENS).logits)


@pytest.mark.peer
def test_pissa_that_peft_converted_to_lora(model, tmp_path):
    """peft's other form: rank 2r on the untouched base."""
    from peft import LoraConfig, get_peft_model

    save.model(model, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM",
                        init_lora_weights="pissa")  # fmt: skip
    theirs = get_peft_model(theirs_of(tmp_path / "base"), config).eval()
    theirs.peft_config["default"].init_lora_weights = True  # as peft's own recipe has it
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.02)
    theirs.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    load_adapter(model, tmp_path / "adapter")
    assert near(model(TOKENS), theirs(TOKENS).logits)


@pytest.mark.peer
@pytest.mark.parametrize("kind", [Prompt, Prefix])
def test_peft_opens_our_prompts(model, tmp_path, kind):
    save.model(model, tmp_path / "base")
    part = kind.from_tokens(model, torch.arange(5))
    part.vectors.data += 0.1 * torch.randn(part.vectors.shape, generator=torch.Generator().manual_seed(0))
    save_prompt(model, part, tmp_path / "adapter", str(tmp_path / "base"))
    logits = theirs_of(tmp_path / "base", tmp_path / "adapter")(TOKENS).logits
    assert near(part(model, TOKENS), logits[:, -TOKENS.shape[1] :])


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_made_by_peft_load(model, tmp_path, kind):
    import peft

    save.model(model, tmp_path / "base")
    torch.manual_seed(0)
    config = getattr(peft, kind)(num_virtual_tokens=5, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs_of(tmp_path / "base"), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    logits = theirs(TOKENS).logits
    assert near(load_prompt(model, tmp_path / "adapter")(model, TOKENS), logits[:, -TOKENS.shape[1] :])


@pytest.mark.peer
def test_a_mix_is_pefts_concatenation(model, tmp_path):
    from peft import PeftModel

    from finetune.peft.lora import combine

    save.model(model, tmp_path / "base")
    for name, rank in (("docs", 4), ("code", 2)):
        apply_lora(model, rank, 8, name=name)
    shake(model)
    for name in ("docs", "code"):
        save_adapter(model, tmp_path / name, str(tmp_path / "base"), name)
    theirs = PeftModel.from_pretrained(theirs_of(tmp_path / "base"), tmp_path / "docs", adapter_name="docs")
    theirs.load_adapter(tmp_path / "code", adapter_name="code")
    theirs.add_weighted_adapter(["docs", "code"], [0.7, 0.4], "mix", combination_type="cat")
    theirs.set_adapter("mix")
    combine(model, {"docs": 0.7, "code": 0.4}, "mix")
    assert near(model(TOKENS), theirs.eval()(TOKENS).logits)
