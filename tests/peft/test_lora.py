"""LoRA, rsLoRA, DoRA, PiSSA: layers against their formulas; several on one base; merged; over weights in few bits."""

import copy

import pytest
import torch
from small_adapters import CONFIG, TOKENS, shake, small_model
from torch import nn

from finetune.errors import UserError
from finetune.lm.io import load, save
from finetune.peft.lora import (
    LoRA,
    LoRALinear,
    activate,
    adapters,
    apply_lora,
    base_tensors,
    combine,
    linear_layers,
    merge,
    set_module,
    unmerge,
)
from finetune.peft.quantize import Int8Linear, NF4Linear, quantize_linears


@pytest.fixture
def model():
    return small_model()


def adapted(linear, rank, alpha, **settings):
    torch.manual_seed(0)
    part = LoRA(linear, rank, alpha, **settings)
    return LoRALinear(linear, default=part), part


def formula(layer, part, x):
    return x @ layer.base.weight.T + part.scale * (x @ part.lora_A.T) @ part.lora_B.T


def test_layer_and_gradients_are_those_of_the_formula():
    layer, part = adapted(nn.Linear(13, 7, bias=False), 3, 5.0)
    layer.double()
    part.lora_B.data.normal_()
    x = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(layer(x), formula(layer, part, x), atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, a, b: type(layer).forward(layer, x), (x, part.lora_A, part.lora_B))
    wanted = torch.autograd.grad(formula(layer, part, x).square().sum(), (x, part.lora_A, part.lora_B))
    got = torch.autograd.grad(layer(x).square().sum(), (x, part.lora_A, part.lora_B))
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantized", [None, NF4Linear, Int8Linear])
def test_a_bias_is_added_once_and_stays_in_the_merged_layer(quantized, dora, dropout):
    """Qwen2's q, k and v; DoRA scales the product and not the bias, as in peft."""
    torch.manual_seed(1)
    base = nn.Linear(64, 7)
    bias = base.bias.detach().clone()
    base = quantized(base) if quantized else base
    layer, part = adapted(base, 3, 5.0, dora=dora, dropout=dropout)
    part.lora_B.data.normal_()
    x = torch.randn(4, 64)
    total = base.weight + part.scale * part.lora_B @ part.lora_A
    if dora:
        part.magnitude.data += 0.5
        total *= (part.magnitude / total.norm(dim=1))[:, None]
    want = x @ total.T + bias
    assert torch.allclose(layer.eval()(x), want, atol=1e-5)
    assert torch.allclose(layer.merged()(x), want, atol=1e-5)
    part.lora_B.data.zero_()
    if not dora:
        assert torch.allclose(layer.train()(x), base(x), atol=1e-6)


def test_bf16_is_summed_in_fp32():
    """A base that returns x exactly: what is left is the adapter's rounding, and there must be one only, at the end."""
    layer, part = adapted(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), 4, 4.0)
    layer.base.weight.data.copy_(torch.eye(64))
    part.lora_B.data.normal_(0, 1e-2)
    x = torch.randn(256, 64).bfloat16().requires_grad_()
    y = layer(x)
    wide = x.float() + part.scale * (x.float() @ part.lora_A.T) @ part.lora_B.T
    assert y.dtype == torch.bfloat16
    assert (y == wide.bfloat16()).float().mean() > 0.999  # the order of fp32 sums may decide a tie
    grads = torch.autograd.grad(y.float().square().sum(), (x, part.lora_A, part.lora_B))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_dropout_is_on_the_adapter_only_and_off_in_eval():
    layer, part = adapted(nn.Linear(16, 16, bias=False), 4, 4.0, dropout=0.5)
    x = torch.randn(64, 16)
    assert torch.equal(layer(x), layer.base(x))  # B is 0: whatever is dropped, the base is whole
    part.lora_B.data.normal_()
    assert not torch.allclose(layer(x), formula(layer, part, x))
    assert torch.allclose(layer.eval()(x), formula(layer, part, x), atol=1e-6)
    mean = torch.stack([layer.train()(x) for _ in range(2000)]).mean(0)
    assert (mean - formula(layer, part, x)).abs().max() < 0.5  # unbiased: one draw is several units away


# --- rsLoRA, DoRA, PiSSA


def test_rslora_scales_by_the_root():
    assert adapted(nn.Linear(32, 32, bias=False), 16, 8.0)[1].scale == 0.5
    assert adapted(nn.Linear(32, 32, bias=False), 16, 8.0, rslora=True)[1].scale == 2.0


@pytest.mark.parametrize("sizes", [(13, 7), (7, 13), (16, 16)], ids=str)
def test_pissa_starts_from_the_largest_singular_triples(sizes):
    linear = nn.Linear(*sizes, bias=False)
    layer, part = adapted(linear, 3, 6.0, pissa=True)
    x = torch.randn(5, sizes[0])
    assert torch.allclose(layer(x), linear(x), atol=1e-6)
    u, s, v = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    top = (u[:, :3] * s[:3]) @ v[:3]
    assert torch.allclose(part.scale * (part.lora_B @ part.lora_A).double(), top, atol=1e-6)
    balanced = part.lora_A.square().sum(1), part.lora_B.square().sum(0)  # √S in both
    assert torch.allclose(*balanced, rtol=1e-5)
    part.lora_B.data += 0.3
    want = linear.weight + part.scale * (part.lora_B @ part.lora_A) - top.float()
    assert torch.allclose(layer.merged().weight, want, atol=1e-5)
    assert torch.allclose(layer(x), x @ want.T, atol=1e-5)


@pytest.mark.parametrize("pissa", [False, True])
def test_dora_is_its_formula_with_the_norm_held_constant(pissa):
    layer, part = adapted(nn.Linear(13, 7, bias=False), 3, 5.0, dora=True, pissa=pissa)
    x = torch.randn(4, 13, requires_grad=True)
    assert torch.allclose(layer(x), layer.base(x), atol=1e-6)  # m = ‖W‖ at the start
    part.lora_B.data.normal_()
    part.magnitude.data += 0.5
    parameters = (x, part.lora_A, part.lora_B, part.magnitude)
    total = layer.base.weight + sum(s * b @ a for a, b, s in part.terms())
    want = x @ (total * (part.magnitude / total.norm(dim=1).detach())[:, None]).T
    assert torch.allclose(layer(x), want, atol=1e-5)
    assert torch.allclose(layer.merged()(x), want, atol=1e-5)
    for got, theirs in zip(*(torch.autograd.grad(y.sin().sum(), parameters) for y in (layer(x), want)), strict=True):
        assert torch.allclose(got, theirs, atol=1e-4)


# --- several adapters on one base


def three(model):
    """docs, code (rsLoRA, other layers) and names (PiSSA), none of them trivial."""
    apply_lora(model, 4, 8, name="docs")
    apply_lora(model, 2, 3, targets=("q", "mlp.up"), name="code", rslora=True)
    apply_lora(model, 3, 3, targets=("v", "down"), name="names", pissa=True)
    shake(model)


def weights_with(model, weights):
    activate(model, weights)
    return {name: layer.merged().weight for name, layer in adapters(model)}


def test_adapters_are_switched_and_mixed(model):
    plain, hashes = model(TOKENS), {name: t.clone() for name, t in base_tensors(model)}
    three(model)
    alone = {name: weights_with(model, {name: 1.0}) for name in ("docs", "code", "names")}
    base = weights_with(model, {})
    assert torch.equal(model(TOKENS), plain)
    mix = {"docs": 0.7, "code": -0.5, "names": 2.0}
    mixed = weights_with(model, mix)
    for layer, found in mixed.items():
        want = base[layer] + sum(w * (alone[name][layer] - base[layer]) for name, w in mix.items())
        assert torch.allclose(found, want, atol=1e-5)
    got = model(TOKENS)
    combine(model, mix, "all")
    assert torch.allclose(model(TOKENS), got, atol=1e-5)
    merge(model, keep=True)
    assert torch.allclose(model(TOKENS), got, atol=2e-5)
    assert not dict(adapters(model))
    unmerge(model)
    assert torch.allclose(model(TOKENS), got, atol=1e-5)
    activate(model, {})
    assert torch.equal(model(TOKENS), plain)
    after = dict(base_tensors(model))
    assert after.keys() == hashes.keys()
    assert all(torch.equal(after[name], hashes[name]) for name in hashes)


def test_a_new_adapter_is_the_only_one_that_learns(model):
    apply_lora(model, name="first")
    second = apply_lora(model, name="second", targets=("q",))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in second}
    assert model.blocks[0].attn.q.active == {"second": 1.0}
    assert model.blocks[0].attn.k.active == {}


def test_dora_can_be_switched_but_not_mixed(model):
    apply_lora(model, 4, name="a")
    apply_lora(model, 4, name="b", dora=True)
    for weights in ({"a": 0.5, "b": 0.5}, {"b": 0.5}):
        with pytest.raises(UserError, match="DoRA"):
            activate(model, weights)
    with pytest.raises(UserError, match="no adapter 'c'"):
        activate(model, {"c": 1.0})
    activate(model, {"b": 1.0})


def test_patterns(model):
    apply_lora(model, 4, 8, targets=("attn.[qk]", r"blocks\.1\.mlp\..*"), rank_pattern={"k": 2, "mlp.down": 6},
               alpha_pattern={r"1\..*": 3})  # fmt: skip
    found = {name: (layer.part("default").rank, layer.part("default").alpha) for name, layer in adapters(model)}
    assert found == {
        "blocks.0.attn.q": (4, 8), "blocks.0.attn.k": (2, 8), "blocks.1.attn.q": (4, 3), "blocks.1.attn.k": (2, 3),
        "blocks.1.mlp.gate": (4, 3), "blocks.1.mlp.up": (4, 3), "blocks.1.mlp.down": (6, 3),
    }  # fmt: skip


# --- QLoRA: adapters over weights in few bits


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["nf4_double", "int8"])
def test_adapters_over_quantized_weights(model, format, dora):
    """The same outputs, gradients and merged weights as over the dense weights that the codes stand for."""
    quantize_linears(model, format)
    dense = copy.deepcopy(model)
    for name, layer in linear_layers(dense).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight.data = layer.weight
        set_module(dense, name, plain)
    made = []
    for each in (model, dense):
        made.append(apply_lora(each, 4, 8, generator=torch.Generator().manual_seed(0), dora=dora))
        shake(each)
    want = dense(TOKENS)
    assert torch.allclose(model(TOKENS), want, atol=1e-5)
    grads = [
        torch.autograd.grad(each(TOKENS).square().mean(), own) for each, own in zip((model, dense), made, strict=True)
    ]
    for mine, theirs in zip(*grads, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    before = {name: t.clone() for name, t in base_tensors(model)}
    torch.optim.SGD(made[0], 0.1).step()
    assert all(torch.equal(t, before[name]) for name, t in base_tensors(model))
    merge(model)
    assert all(type(m) is nn.Linear for m in linear_layers(model).values())


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
    assert torch.equal(*(each.blocks[1].mlp.down.part("default").lora_A for each in (model, other)))
    bound = CONFIG.hidden**-0.5
    assert bound * 0.9 < model.blocks[1].mlp.down.part("default").lora_A.abs().max() <= bound


def test_merge_gives_the_same_plain_model(model, tmp_path):
    apply_lora(model, rank=4, alpha=8)
    shake(model)
    adapted = model(TOKENS)
    with pytest.raises(UserError, match="merge the adapter"):
        save.model(model, tmp_path)
    merge(model)
    assert not dict(adapters(model))
    assert torch.allclose(model(TOKENS), adapted, atol=2e-6)
    save.model(model, tmp_path)
    assert torch.equal(load.llama(tmp_path)(TOKENS), model(TOKENS))


def test_bad_settings(model):
    with pytest.raises(UserError, match=r"'attn\.qq' names no linear layer; did you mean 'attn\.q'"):
        apply_lora(model, targets=("attn.qq",))
    with pytest.raises(UserError, match="rank"):
        apply_lora(model, rank=0)
    apply_lora(model)
    with pytest.raises(UserError, match="already"):
        apply_lora(model)
