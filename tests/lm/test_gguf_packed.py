"""GGUF's blocks served as they are: the values of the gguf package, whole models, rows in our order."""

import gguf
import numpy as np
import pytest
import torch
from small_gguf import tiny, write

from finetune.errors import UserError
from finetune.inference.packed import from_gguf, packed_weights
from finetune.lm.io import load
from finetune.lm.io.gguf import GGUFModel
from finetune.lm.io.gguf_packed import SERVED, packed
from finetune.lm.io.gguf_types import TYPES


def blocks(kind, rows=37, columns=3, seed=0):
    """Random bytes whose fp16 numbers are finite: the gguf package cannot write K-quants."""
    g = np.random.default_rng(seed)
    one = TYPES[kind]
    raw = g.integers(0, 256, (rows * columns, one.nbytes), np.uint8)
    for at in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        numbers = (g.standard_normal(len(raw)) * 10.0 ** g.integers(-6, 3, len(raw))).astype(np.float16)
        raw[:, at : at + 2] = numbers[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("layout", ["rows", "cpu"])
@pytest.mark.parametrize("kind", SERVED)
def test_values_are_those_of_the_gguf_package(kind, layout):
    raw = blocks(kind)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    weight = packed(raw, kind)
    assert weight.shape == wanted.shape
    assert torch.equal(weight.laid_out(layout).dequantize(), torch.from_numpy(wanted))
    some = torch.tensor([36, 0, 17, 17])
    assert torch.equal(weight.laid_out(layout).rows(some), torch.from_numpy(wanted)[some])


@pytest.mark.parametrize("kind", SERVED)
def test_bytes_are_near_those_of_the_file(kind):
    """K-quants keep their two scales multiplied, in fp32."""
    raw = blocks(kind, rows=64, columns=4)
    more = {"Q4_K": 64 / 32 - 0.5, "Q6_K": 8 + 32 / 16 - 6.5625}.get(kind, 0)  # bits a weight
    weight = packed(raw, kind)
    assert weight.nbytes == raw.nbytes + more * weight.shape[0] * weight.shape[1] / 8


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model(tmp_path, kind, tied):
    path = write(tmp_path / "m.gguf", tiny(tied=tied), kind)
    dense, told = load.llama(path), []
    model = from_gguf(GGUFModel(path), torch.float32, report=lambda *what: told.append(what))
    found = dict(packed_weights(model))
    assert len(found) == 2 * 7 + (1 if tied else 2)
    assert len(told) == (len(found) if kind == "Q5_1" else 0)
    for name, weight in found.items():
        wanted = dense.get_parameter(f"{'head' if name == 'packed_head' else name}.weight")
        if kind in SERVED or kind == "F32":
            assert torch.equal(weight.dequantize(), wanted)
        else:  # int8 in the place of 5 bits, bf16 of fp16
            assert (weight.dequantize() - wanted).abs().max() <= wanted.abs().max() / 200
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name))
    assert (model.token_ids, model.generation_ids) == (dense.token_ids, dense.generation_ids)
    tokens = torch.arange(20)[None]
    if kind in SERVED or kind == "F32":
        with torch.no_grad():
            wanted = dense(tokens)
            assert torch.allclose(model(tokens), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_fused_rows_and_norms_of_weight_plus_one(tmp_path):
    """Phi-like files have q, k and v below each other; Gemma's norms hold weight + 1."""
    path = write(tmp_path / "m.gguf", tiny(), "Q8_0")
    file = GGUFModel(path)
    rows = {name: values for name, kind, values in file.stored()}
    infos = dict(file.tensor_infos)
    joined = np.concatenate([file.raw(f"blk.0.attn_{letter}.weight") for letter in "qkv"])

    class Fused(GGUFModel):
        def raw(self, name):
            return joined if name == "blk.0.attn_qkv.weight" else super().raw(name)

    first = infos.pop("blk.0.attn_q.weight")
    del infos["blk.0.attn_k.weight"], infos["blk.0.attn_v.weight"]
    infos["blk.0.attn_qkv.weight"] = type(first)(first.kind, (128, 64), first.start, joined.nbytes, first.file)
    again = {name: values for name, _, values in Fused(path, (file.metadata, infos)).stored()}
    assert again.keys() == rows.keys()
    assert all(np.array_equal(again[name], rows[name]) for name in rows)


def test_damaged_files_are_refused(tmp_path):
    path = write(tmp_path / "m.gguf", tiny(), "Q4_0")
    file = GGUFModel(path)
    infos = {name: info for name, info in file.tensor_infos.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.up\.weight is missing"):
        from_gguf(GGUFModel(path, (file.metadata, infos)))
    one = file.tensor_infos["blk.0.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[one.start : one.start + 2] = np.array([np.nan], np.float16).tobytes()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.up\.weight holds NaN or infinite numbers"):
        from_gguf(GGUFModel(path))
    wrong = file.tensor_infos | {"blk.0.ffn_up.weight": type(one)(one.kind, (48, 128), one.start, one.nbytes, path)}
    with pytest.raises(UserError, match=r"up\.weight has shape \(48, 128\), its configuration requires \(96, 64\)"):
        from_gguf(GGUFModel(path, (file.metadata, wrong)))
