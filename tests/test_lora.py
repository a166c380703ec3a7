"""LoRA: the layer against its formula, apply/merge, adapter folders of ours and of peft's."""

import copy
import json

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.llama import Llama, LlamaConfig
from finetune.lora import TARGETS, LoRALinear, adapters, apply_lora, load_adapter, merge, save_adapter

CONFIG = LlamaConfig(vocab_size=50, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=64)
TOKENS = torch.arange(40).view(2, 20) % 50


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Llama(CONFIG)


def shake(model):
    """B away from 0, so that the adapter does something."""
    g = torch.Generator().manual_seed(1)
    for _, layer in adapters(model):
        layer.lora_B.data.normal_(0, 0.05, generator=g)


def formula(layer, x):
    return x @ layer.base.weight.T + layer.scale * (x @ layer.lora_A.T) @ layer.lora_B.T


def test_layer_and_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(13, 7, bias=False), 3, 5.0).double()
    layer.lora_B.data.normal_()
    x = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(layer(x), formula(layer, x), atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, a, b: type(layer).forward(layer, x), (x, layer.lora_A, layer.lora_B))
    wanted = torch.autograd.grad(formula(layer, x).square().sum(), (x, layer.lora_A, layer.lora_B))
    got = torch.autograd.grad(layer(x).square().sum(), (x, layer.lora_A, layer.lora_B))
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-11)


def test_bf16_is_summed_in_fp32():
    """A base that returns x exactly: what is left is the adapter's rounding, and there must be one only, at the end."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), 4, 4.0)
    layer.base.weight.data.copy_(torch.eye(64))
    layer.lora_B.data.normal_(0, 1e-2)
    x = torch.randn(256, 64).bfloat16().requires_grad_()
    y = layer(x)
    wide = x.float() + layer.scale * (x.float() @ layer.lora_A.T) @ layer.lora_B.T
    assert y.dtype == torch.bfloat16
    assert (y == wide.bfloat16()).float().mean() > 0.999  # the order of fp32 sums may decide a tie
    grads = torch.autograd.grad(y.float().square().sum(), (x, layer.lora_A, layer.lora_B))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_dropout_is_on_the_adapter_only_and_off_in_eval():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 16, bias=False), 4, 4.0, dropout=0.5)
    x = torch.randn(64, 16)
    assert torch.equal(layer(x), layer.base(x))  # B is 0: whatever is dropped, the base is whole
    layer.lora_B.data.normal_()
    assert not torch.allclose(layer(x), formula(layer, x))
    assert torch.allclose(layer.eval()(x), formula(layer, x), atol=1e-6)
    mean = torch.stack([layer.train()(x) for _ in range(2000)]).mean(0)
    assert (mean - formula(layer, x)).abs().max() < 0.5  # unbiased: one draw is several units away


def test_apply_freezes_all_but_the_adapters(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain = model(TOKENS)
    trainable = apply_lora(model, rank=4, alpha=8)
    assert torch.equal(model(TOKENS), plain)  # B = 0
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == len(trainable) == 2 * 7 * CONFIG.layers
    assert all(name.endswith(("lora_A", "lora_B")) for name in names)
    shake(model)
    optimizer = torch.optim.SGD(trainable, 0.1)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if name not in names:
            assert p.grad is None
            assert torch.equal(p, before[name.replace(".base.", ".")])


def test_apply_is_a_function_of_the_generator(model):
    other = copy.deepcopy(model)
    apply_lora(model, generator=torch.Generator().manual_seed(5))
    torch.rand(3)
    apply_lora(other, generator=torch.Generator().manual_seed(5))
    assert torch.equal(model.blocks[1].mlp.down.lora_A, other.blocks[1].mlp.down.lora_A)
    bound = CONFIG.hidden**-0.5
    assert bound * 0.9 < model.blocks[1].mlp.down.lora_A.abs().max() <= bound


def test_merge_gives_the_same_plain_model(model, tmp_path):
    apply_lora(model, rank=4, alpha=8)
    shake(model)
    adapted = model(TOKENS)
    with pytest.raises(UserError, match="merge the adapter"):
        model.save_pretrained(tmp_path)
    merge(model)
    assert not dict(adapters(model))
    assert torch.allclose(model(TOKENS), adapted, atol=2e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(Llama.from_pretrained(tmp_path)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("targets", [TARGETS, ("q", "v"), ("blocks.1.attn.q", "mlp.down")])
def test_adapter_folder_round_trip(model, tmp_path, targets):
    base = copy.deepcopy(model)
    apply_lora(model, rank=3, alpha=7, targets=targets)
    shake(model)
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(base(TOKENS), model(TOKENS))
    assert not [f.name for f in tmp_path.iterdir() if "tmp" in f.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 5}, "lora_A of blocks.0"),
        ({"r": None}, "r should be a number"),
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
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        load_adapter(base, tmp_path)


def test_bad_settings(model):
    with pytest.raises(UserError, match=r"'attn\.qq' names no linear layer; did you mean 'attn\.q'"):
        apply_lora(model, targets=("attn.qq",))
    with pytest.raises(UserError, match="rank"):
        apply_lora(model, rank=0)
    apply_lora(model)
    with pytest.raises(UserError, match="already"):
        apply_lora(model)


@pytest.mark.peer
@pytest.mark.parametrize("targets", [TARGETS, ("blocks.1.attn.q", "mlp.down")])
def test_peft_opens_our_adapter(model, tmp_path, targets):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path / "base")
    apply_lora(model, rank=4, alpha=8, targets=targets)
    shake(model)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    want = theirs.eval()(TOKENS).logits
    assert (model(TOKENS) - want).abs().max() <= 2e-6 * want.abs().max()
    assert sum("lora_" in name for name, _ in theirs.named_parameters()) == 2 * len(dict(adapters(model)))


@pytest.mark.peer
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_made_by_peft_loads(model, tmp_path, rslora):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules="all-linear",
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    want = theirs(TOKENS).logits
    assert (model(TOKENS) - want).abs().max() <= 2e-6 * want.abs().max()
