"""Llama: invariants on a small random model, folders in and out, and equality with transformers."""

import json
import math
import pydoc_data.topics

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.lm.io import load, save
from finetune.lm.io.hf_llama import from_hf, read_config, to_hf
from finetune.lm.llama import Llama, LlamaConfig

CONFIG = {
    "vocab_size": 97,
    "dim": 48,
    "layers": 3,
    "heads": 6,
    "kv_heads": 2,
    "hidden": 80,
    "max_length": 64,
    "rope_theta": 5000.0,
}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**(CONFIG | changes)))
    with torch.no_grad():
        for parameter in model.parameters():  # the usual small init would hide mistakes behind near-uniform outputs
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return model


def tokens(*shape, seed=1):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return tiny()


@torch.no_grad()
def test_packed_documents_are_as_if_alone(model):
    sizes = [5, 1, 17, 9]
    row = tokens(1, sum(sizes))
    bounds = torch.tensor([0, *torch.tensor(sizes).cumsum(0)])
    packed = model(row, cu_seqlens=bounds)[0].split(sizes)
    for logits, document in zip(packed, row[0].split(sizes), strict=True):
        torch.testing.assert_close(logits, model(document[None])[0], atol=2e-5, rtol=1e-5)
    assert (model(row)[0].split(sizes)[2] - packed[2]).abs().max() > 0.1  # without bounds they would see each other


@torch.no_grad()
def test_right_padding_changes_nothing(model):
    rows, lengths = tokens(3, 20), torch.tensor([20, 1, 13])
    padded = model(rows, lengths=lengths)
    for row, length, logits in zip(rows, lengths.tolist(), padded, strict=True):
        torch.testing.assert_close(logits[:length], model(row[None, :length])[0], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_causal(model):
    row = tokens(1, 20)
    changed = row.clone()
    changed[0, 12:] = tokens(8, seed=2)
    torch.testing.assert_close(model(row)[:, :12], model(changed)[:, :12], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_times_head_is_logits():
    for tied in (True, False):
        model, row = tiny(tied=tied), tokens(2, 7)
        assert (model.head_weight is model.embed.weight) == tied
        torch.testing.assert_close(F.linear(model(row, hidden=True), model.head_weight), model(row))


def test_gradient_checkpointing_gives_the_same_gradients_with_less_memory():
    model, row = tiny(), tokens(2, 30)

    def run(checkpointing):
        model.gradient_checkpointing, model.saved = checkpointing, 0

        def save(tensor):
            model.saved += tensor.nbytes
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = F.cross_entropy(model(row)[:, :-1].flatten(0, 1), row[:, 1:].flatten())
        loss.backward()
        return model.saved, [parameter.grad.clone() for parameter in model.parameters()]

    bytes_plain, plain = run(False)
    bytes_kept, kept = run(True)
    for one, other in zip(plain, kept, strict=True):
        assert torch.equal(one, other)
    assert bytes_kept < 0.5 * bytes_plain


def test_rotary_angles():
    model = tiny(max_length=1000)
    model.to(torch.bfloat16)
    cos, sin = model.rotary.on(torch.device("cpu"))
    for position, pair in ((0, 0), (999, 0), (500, 3)):
        angle = position * 5000.0 ** (-2 * pair / 8)
        assert cos[position, pair].item() == pytest.approx(math.cos(angle), abs=1e-4)
        assert sin[position, pair].item() == pytest.approx(math.sin(angle), abs=1e-4)
    assert cos.dtype == torch.float32


def test_init_is_gpt2s():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**(CONFIG | {"dim": 96, "hidden": 400})))
    block = model.blocks[1]
    assert block.mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for residual in (block.attn.o, block.mlp.down):
        assert residual.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.03)
    assert torch.equal(model.norm.weight, torch.ones(96))
    row = tokens(8, 50)
    loss = F.cross_entropy(model(row)[:, :-1].flatten(0, 1), row[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(97), abs=0.1)


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"head_dim": 12}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_keep_every_byte(tmp_path, changes, dtype):
    model = tiny(**changes).to(dtype)
    model.token_ids = {"bos_token_id": 1, "eos_token_id": 2}
    save.model(model, tmp_path / "a")
    again = load.llama(tmp_path / "a", dtype=dtype)
    assert again.config == model.config
    assert again.token_ids == model.token_ids
    for (name, one), (other_name, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name
        assert other.dtype == dtype
        assert torch.equal(one, other)
    save.model(again, tmp_path / "b")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_names_there_and_back():
    for name, _ in tiny(tied=False).named_parameters():
        assert from_hf(to_hf(name)) == name != to_hf(name)


def test_adapters_are_not_saved_as_a_model(tmp_path):
    model = tiny()
    model.blocks[0].attn.q.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.q\.extra .* merge the adapter"):
        save.model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sharded_folder(tmp_path):
    model = tiny()
    save.model(model, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    names = sorted(whole)
    parts = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, members in parts.items():
        save_file({name: whole[name] for name in members}, tmp_path / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    again = load.llama(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.*missing"):
        load.llama(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gptj"),
        ("hidden_act", "gelu"),
        ("sliding_window", 4096),
        ("quantization_config", {"bits": 4}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("hidden_size", None),
        ("num_hidden_layers", "many"),
    ],
)
def test_unsupported_config_is_named(tmp_path, key, value):
    save.model(tiny(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(UserError, match=key):
        load.llama(tmp_path)


def test_theta_of_both_config_generations(tmp_path):
    save.model(tiny(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert read_config(raw, "x").rope_theta == 5000.0
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    assert read_config(raw, "x").rope_theta == 5000.0


def test_bad_folders(tmp_path):
    def broken(match):
        with pytest.raises(UserError, match=match) as caught:
            load.llama(tmp_path / "m")
        assert "\n" not in str(caught.value)

    broken("no model")
    (tmp_path / "m").mkdir()
    broken("config.json")
    model, file = tiny(), tmp_path / "m" / "model.safetensors"
    save.model(model, tmp_path / "m")
    whole = file.read_bytes()
    for cut in (len(whole) - 100, 50, 4, 0):
        file.write_bytes(whole[:cut])
        broken("damaged or cut short")
    file.write_bytes(b"\xff" * 8 + whole[8:])
    broken("damaged or cut short")
    tensors = {to_hf(name): parameter.detach() for name, parameter in model.named_parameters()}
    missing = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    broken(r"norm.weight is missing")
    save_file(tensors | {"model.norm.weight": missing[:-1].clone()}, file)
    broken(r"norm.weight has shape \(47,\)")
    save_file(tensors | {"model.norm.weight": missing, "model.norm.bias": missing.clone()}, file)
    broken("model.norm.bias does not belong")
    file.rename(tmp_path / "m" / "pytorch_model.bin")
    broken("pickle")
    (tmp_path / "m" / "config.json").write_text("{")
    broken("config.json is not JSON")


def test_bad_arguments(model):
    with pytest.raises(UserError, match="token 97 is not in the vocabulary of 97"):
        model(torch.tensor([[3, 97]]))
    with pytest.raises(UserError, match="token -1"):
        model(torch.tensor([[3, -1]]))
    with pytest.raises(UserError, match="65 tokens do not fit"):
        model(tokens(1, 65))
    with pytest.raises(UserError, match="position 64"):
        model(tokens(1, 1), positions=torch.tensor([[64]]))
    with pytest.raises(UserError, match="cu_seqlens"):
        model(tokens(2, 4), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(UserError, match="cu_seqlens must rise from 0 to 4"):
        model(tokens(1, 4), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(UserError, match="must be"):
        model(torch.zeros(1, 3))
    with pytest.raises(UserError, match="multiple"):
        LlamaConfig(**(CONFIG | {"kv_heads": 4}))


def test_unwritable_folder(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save.model(model, tmp_path / "file" / "folder")


@pytest.mark.peer
@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"tied": False, "head_dim": 12}], ids=str)
def test_folders_cross_over_to_transformers_and_back(tmp_path, changes):
    from transformers import AutoModelForCausalLM

    model, row = tiny(**changes), tokens(2, 40)
    save.model(model, tmp_path / "ours")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert peer.dtype == torch.float32
    torch.testing.assert_close(model(row), peer(row).logits, atol=1e-4, rtol=1e-5)
    peer.save_pretrained(tmp_path / "theirs")
    again = load.llama(tmp_path / "theirs")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.fixture(scope="module")
def text(smollm2_tokenizer):
    longest = max(pydoc_data.topics.topics.values(), key=len)
    return torch.tensor([smollm2_tokenizer.encode(longest)[:512]])


@pytest.mark.peer
@torch.no_grad()
def test_smollm2_logits_equal_transformers(smollm2_model, smollm2_peer, text):
    ours, theirs = smollm2_model(text), smollm2_peer(text).logits
    assert (ours - theirs).abs().max() <= 2e-3
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.peer
def test_smollm2_gradients_equal_transformers(smollm2_model, smollm2_peer, text):
    """Every parameter's gradient of a masked loss, to 1e-4 of its norm."""
    row, targets = text[:, :128], text[0, 1:129].clone()
    targets[:40] = -100
    F.cross_entropy(smollm2_peer(row).logits[0], targets).backward()
    F.cross_entropy(smollm2_model(row)[0], targets).backward()
    theirs = {from_hf(name): parameter.grad for name, parameter in smollm2_peer.named_parameters()}
    try:
        for name, parameter in smollm2_model.named_parameters():
            assert (parameter.grad - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
    finally:
        smollm2_model.zero_grad()
        smollm2_peer.zero_grad()
