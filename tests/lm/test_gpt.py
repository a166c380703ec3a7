"""GPT-2: invariants on a small random model, folders in and out, and equality with transformers."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from finetune.errors import UserError
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io import load, save
from finetune.lm.io.hf_gpt2 import from_hf, to_hf

CONFIG = {"vocab_size": 97, "dim": 48, "layers": 2, "heads": 4, "max_length": 64}


def tiny(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(CONFIG | changes)))
    with torch.no_grad():
        for parameter in model.parameters():  # the usual small init would hide mistakes behind near-uniform outputs
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(*shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_packing_and_padding_change_nothing():
    model, sizes = tiny(), [5, 1, 17, 9]
    row = tokens(1, sum(sizes))
    packed = model(row, cu_seqlens=torch.tensor([0, *torch.tensor(sizes).cumsum(0)]))[0].split(sizes)
    documents = row[0].split(sizes)
    padded = model(torch.stack([F.pad(document, (0, 17 - len(document))) for document in documents]),
                   lengths=torch.tensor(sizes))  # fmt: skip
    for i, document in enumerate(documents):
        alone = model(document[None])[0]
        torch.testing.assert_close(packed[i], alone, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(padded[i, : sizes[i]], alone, atol=2e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, row = tiny(), tokens(2, 30)
    found = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        F.cross_entropy(model(row)[:, :-1].flatten(0, 1), row[:, 1:].flatten()).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_init_is_gpt2s():
    torch.manual_seed(0)
    model, row = GPT(GPTConfig(**(CONFIG | {"dim": 96}))), tokens(8, 50)
    block = model.blocks[1]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.02)
    assert not block.attn.qkv.bias.any()
    loss = F.cross_entropy(model(row)[:, :-1].flatten(0, 1), row[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(97), abs=0.1)


def test_sizes_of_the_published_models():
    from finetune.lm import presets

    def count(name):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in GPT(GPTConfig(**presets.GPT[name])).parameters())

    assert {name: count(name) for name in presets.GPT} == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }


def test_save_and_load_keep_every_byte(tmp_path):
    model = tiny(hidden=100)
    model.token_ids = {"eos_token_id": 5}
    save.model(model, tmp_path / "a")
    again = load.gpt(tmp_path / "a")
    assert (again.config, again.token_ids) == (model.config, model.token_ids)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert from_hf(to_hf(name)) == name
        assert torch.equal(one, other)
        assert other.is_contiguous()
    save.model(again, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gptj"),
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("n_embd", None),
    ],
)
def test_unsupported_config_is_named(tmp_path, key, value):
    save.model(tiny(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(UserError, match=key):
        load.gpt(tmp_path)


def test_bad_input(tmp_path):
    model = tiny()
    with pytest.raises(UserError, match="token 97"):
        model(torch.tensor([[97]]))
    with pytest.raises(UserError, match="65 tokens do not fit"):
        model(tokens(1, 65))
    with pytest.raises(UserError, match="no model"):
        load.gpt(tmp_path / "nowhere")
    save.model(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged or cut short"):
        load.gpt(tmp_path)


@pytest.mark.peer
@torch.no_grad()
def test_equals_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    peer, row = GPT2LMHeadModel(config).eval(), tokens(3, 64)
    for parameter in peer.parameters():  # biases are born 0, which would hide a lost one
        parameter.add_(torch.randn_like(parameter) * 0.02)
    peer.save_pretrained(tmp_path / "theirs")
    model = load.gpt(tmp_path / "theirs")
    torch.testing.assert_close(model(row), peer(row).logits, atol=1e-5, rtol=0)
    save.model(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(row).logits, peer(row).logits)


@pytest.mark.peer
def test_gradients_equal_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model, row = tiny(), tokens(2, 40)
    save.model(model, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for logits in (model(row), peer(row).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), row[:, 1:].flatten()).backward()
    theirs = {from_hf(name): parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        wanted = (
            theirs[name].t() if name.endswith(("qkv.weight", "o.weight", "up.weight", "down.weight")) else theirs[name]
        )
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-9, name
