"""Modules that an adapter holds whole: trained, switched, resized, saved; equal to peft's in both directions."""

import copy
import warnings

import pytest
import torch
from small_adapters import TOKENS, shake, small_model

from finetune.errors import UserError
from finetune.lm.io import load, save
from finetune.peft import lora, whole
from finetune.peft.adapters import load_adapter, save_adapter

EACH_TYING = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
MORE = torch.arange(40).view(2, 20) % 53  # tokens of a vocabulary with three more


@pytest.fixture
def model(tied):
    return small_model(tied=tied)


def near(mine, theirs):
    return mine.shape == theirs.shape and (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def grow(model):
    """Three more tokens."""
    for table in (model.embed, *(() if model.config.tied else (model.head,))):
        whole.set_weight(table, torch.cat([table.weight, table.weight[:3]]).detach())
    whole.fit_vocabulary(model)


def moved(parameters):
    """Away from where they began."""
    g = torch.Generator().manual_seed(2)
    for p in parameters:
        p.data += 0.1 * torch.randn(p.shape, generator=g)


@EACH_TYING
@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["norm", r"blocks\.1\.mlp_norm"], ["embed", "norm"]])
def test_a_module_is_trained_switched_and_saved(model, tmp_path, tied, names):
    base = copy.deepcopy(model)
    before, hashed = base(TOKENS), dict(lora.base_tensors(base))
    lora.apply_lora(model, 2)
    trained = lora.train_modules(model, names)
    assert near(model(TOKENS), before)
    moved(trained)
    shake(model)
    model(TOKENS).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained)
    assert {id(p) for p in trained} < {id(p) for p in model.parameters() if p.requires_grad}
    want = model(TOKENS)
    lora.activate(model, {})
    assert torch.equal(model(TOKENS), before)
    assert all(torch.equal(hashed[name], tensor) for name, tensor in lora.base_tensors(model))
    lora.activate(model, {"default": 1.0})
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    assert near(base(TOKENS), want)
    assert base.config.tied == tied
    lora.merge(base)
    assert near(base(TOKENS), want)
    save.model(base, tmp_path / "merged")
    assert near(load.llama(tmp_path / "merged")(TOKENS), want)


@EACH_TYING
def test_new_tokens_resize_the_model_and_go_with_the_adapter(model, tmp_path, tied):
    base = copy.deepcopy(model)
    grow(model)
    lora.apply_lora(model, 2)
    trained = lora.train_modules(model, ["embed", "head"])
    assert (model.config.vocab_size, len(trained)) == (53, 1 if tied else 2)
    moved(trained)
    want = model(MORE)
    assert want.shape[-1] == 53
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    assert near(base(MORE), want)
    lora.activate(base, {})
    assert base.config.vocab_size == 50
    lora.activate(base, {"default": 1.0})
    lora.merge(base)
    save.model(base, tmp_path / "merged")
    merged = load.llama(tmp_path / "merged")
    assert near(merged(MORE), want)
    assert merged.config.tied == tied


def test_several_adapters_of_which_one_has_its_own_head(tmp_path):
    """On a tied base: one adapts the head, one holds the table of more tokens, one is plain."""
    model, want = small_model(), {}
    for name in ("head", "tokens", "plain"):
        own = small_model()
        if name == "tokens":
            grow(own)
        lora.apply_lora(own, 2, targets=("q", "head") if name == "head" else ("q",), name=name)
        if name == "tokens":
            moved(lora.train_modules(own, ["embed"], name))
        shake(own)
        want[name] = own(TOKENS)
        save_adapter(own, tmp_path / name, name=name)
    want["none"] = small_model()(TOKENS)
    for order in (("head", "tokens", "plain"), ("tokens", "plain", "head")):
        model = small_model()
        for name in order:
            load_adapter(model, tmp_path / name, name)
        for name in ("plain", "tokens", "none", "head", "tokens"):
            lora.activate(model, {} if name == "none" else {name: 1.0})
            assert near(model(TOKENS), want[name]), (order, name)
        for weights in ({"tokens": 1.0, "plain": 1.0}, {"tokens": 0.5}):
            with pytest.raises(UserError, match=r"'tokens' holds (embed|head) whole: it can be switched"):
                lora.activate(model, weights)
        lora.unload(model)
        assert torch.equal(model(TOKENS), want["none"])
        assert (model.config.tied, model.config.vocab_size) == (True, 50)


@pytest.mark.parametrize("tied", [True])
def test_what_cannot_be_trained_whole(model, tied):
    lora.apply_lora(model, 2, targets=("q",))
    with pytest.raises(UserError, match="module 'nrm' cannot be trained whole: it names none; did you mean 'norm'"):
        lora.train_modules(model, ["nrm"])
    with pytest.raises(UserError, match="it names none"):
        lora.train_modules(model, ["q_proj"])
    with pytest.raises(UserError, match="no dropout"):
        lora.apply_lora(model, 2, dropout=0.1, targets=("head",), name="second")


# --- peft


def theirs_of(folder, rows=0):
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(folder)
    if rows:
        torch.manual_seed(3)
        made.resize_token_embeddings(rows)
    return made


THEIRS = {
    "head": ({"modules_to_save": ["lm_head"]}, 0),
    "embedding": ({"modules_to_save": ["embed_tokens"]}, 0),
    "both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 0),
    "norms": ({"modules_to_save": ["norm", "input_layernorm"]}, 0),
    "LoRA of the head": ({"target_modules": ["q_proj", "lm_head"]}, 0),
    "DoRA of the head": ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, 0),
    "LoRA of the embedding": ({"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}, 0),
    "trained tokens": ({"trainable_token_indices": [3, 7]}, 0),
    "trained tokens by module": ({"trainable_token_indices": {"embed_tokens": [3, 7]}}, 0),
    "resized": ({}, 53),
    "resized, smaller": ({}, 48),
    "resized and trained": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 53),
    "resized, embedding trained": ({"modules_to_save": ["embed_tokens"]}, 53),
    "resized, new tokens trained": ({"trainable_token_indices": [50, 51, 52]}, 53),
    "resized, LoRA of the head": ({"target_modules": ["q_proj", "lm_head"]}, 53),
    "tied in peft": ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, 0),
    "regular expression": ({"target_modules": r".*\.1\..*(q_proj|down_proj)"}, 0),
    "layers and pattern": ({"layers_to_transform": [1], "rank_pattern": {r"layers\.1\.self_attn.q_proj": 5}}, 0),
}


@pytest.mark.peer
@EACH_TYING
@pytest.mark.parametrize("variant", THEIRS)
def test_an_adapter_made_by_peft(model, tmp_path, tied, variant):
    """Equal on the base, after switching off and on, merged, and written again and opened by peft."""
    from peft import LoraConfig, PeftModel, get_peft_model

    settings, rows = THEIRS[variant]
    base, tokens = tmp_path / "base", MORE % min(rows or 50, 50) if rows < 53 else MORE
    save.model(model, base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(theirs_of(base, rows), LoraConfig(**settings)).eval()
        moved(p for p in theirs.parameters() if p.requires_grad)
        theirs.save_pretrained(tmp_path / "adapter")
        want = theirs(tokens).logits
    if variant == "resized, LoRA of the head" and not tied:  # peft does not write the embedding's new rows
        with pytest.raises(UserError, match="embedding and head have 50 and 53 rows"):
            load_adapter(model, tmp_path / "adapter")
        return
    load_adapter(model, tmp_path / "adapter")
    assert near(model(tokens), want)
    lora.activate(model, {})
    assert near(model(TOKENS), load.llama(base)(TOKENS))
    lora.activate(model, {"default": 1.0})
    save_adapter(model, tmp_path / "again", str(base))
    opened = PeftModel.from_pretrained(theirs_of(base, rows), tmp_path / "again").eval()
    assert near(opened(tokens).logits, want)
    again = load.llama(base)
    load_adapter(again, tmp_path / "again")
    assert near(again(tokens), want)
    lora.merge(model)
    save.model(model, tmp_path / "merged")
    assert near(theirs_of(tmp_path / "merged")(tokens).logits, want)


@pytest.mark.peer
@EACH_TYING
@pytest.mark.parametrize("rows", [0, 53])
def test_peft_opens_new_tokens_trained_here(model, tmp_path, tied, rows):
    from peft import PeftModel

    save.model(model, tmp_path / "base")
    if rows:
        grow(model)
    lora.apply_lora(model, 2, targets=("q", "down"))
    moved(lora.train_modules(model, ["embed", "head", "norm"] if rows else ["embed", "norm"]))
    shake(model)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(theirs_of(tmp_path / "base", rows), tmp_path / "adapter").eval()
    tokens = MORE if rows else TOKENS
    assert near(theirs(tokens).logits, model(tokens))
    assert near(theirs.merge_and_unload()(tokens).logits, model(tokens))
