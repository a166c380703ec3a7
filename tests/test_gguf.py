"""GGUF: every block type against the gguf package, and a whole file written with it and read back."""

import gguf
import numpy as np
import pytest
import torch
from small_gguf import TEXT, permute, tiny, write

from finetune.errors import UserError
from finetune.gguf import TYPES, decimal, dequantise, unpermute
from finetune.llama import Llama

OFFSETS_OF_HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q6_K": [208]}


def random_bytes(kind, rows=7, blocks=5, seed=0):
    """Random blocks of a type, with every fp16 scale finite; (rows, blocks · bytes) uint8."""
    rng = np.random.default_rng(seed)
    size, width, _ = TYPES[kind]
    if size == 1:
        numbers = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
        return (
            numbers.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
            .view(torch.uint8)
            .numpy()
        )
    raw = rng.integers(0, 256, (rows, blocks, width), dtype=np.uint8)
    for offset in OFFSETS_OF_HALVES[kind]:
        scales = rng.standard_normal((rows, blocks, 1)).astype(np.float16)
        raw[:, :, offset : offset + 2] = scales.view(np.uint8)
    return raw.reshape(rows, blocks * width)


@pytest.mark.parametrize("kind", TYPES)
def test_dequantises_exactly_as_the_gguf_package(kind):
    raw = random_bytes(kind)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    if kind in ("F32", "F16"):  # which it leaves to the reader
        theirs = raw.view(np.float32 if kind == "F32" else np.float16).astype(np.float32)
    ours = dequantise(raw, kind)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.array_equal(ours, theirs)
    assert np.abs(ours).max() > 0.1


def test_dequantise_refuses():
    with pytest.raises(UserError, match="Q5_K is not supported"):
        dequantise(np.zeros((1, 176), np.uint8), "Q5_K")
    with pytest.raises(ValueError, match="whole number"):
        dequantise(np.zeros((1, 35), np.uint8), "Q8_0")


def test_decimal():
    assert decimal(9.999999747378752e-06) == 1e-05
    assert decimal(100000.0) == 100000.0


def test_unpermute_is_the_inverse():
    weight = np.arange(24 * 3).reshape(24, 3)
    assert not np.array_equal(permute(weight, 3), weight)
    assert np.array_equal(unpermute(permute(weight, 3), 3), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_file_there_and_back(tmp_path, tied):
    model = tiny(tied=tied)
    again = Llama.from_pretrained(write(tmp_path / "m.gguf", model))
    assert again.config == model.config
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("kind", "error"), [("Q8_0", 0.02), ("Q4_1", 0.2), ("Q4_0", 0.3), ("BF16", 0.01), ("F16", 1e-3)]
)
def test_quantised_file(tmp_path, kind, error):
    model = tiny()
    again = Llama.from_pretrained(write(tmp_path / "m.gguf", model, kind))
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert (one - other).abs().max() <= error, name


def test_tokenizer_there_and_back(tmp_path):
    from finetune.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([TEXT], 300)
    path = write(tmp_path / "m.gguf", tiny(), tokenizer=tokenizer)
    again = Tokenizer.from_pretrained(path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.decode(again.encode(TEXT)) == TEXT
    assert again.token_ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # pad = eos is not taken over
    assert Llama.from_pretrained(path).token_ids == {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
    ],
)
def test_unsupported_key_is_named(tmp_path, extra, match):
    with pytest.raises(UserError, match=match):
        Llama.from_pretrained(write(tmp_path / "m.gguf", tiny(), extra=extra))


def test_bad_files(tmp_path):
    path = tmp_path / "m.gguf"

    def broken(match):
        with pytest.raises(UserError, match=match) as caught:
            Llama.from_pretrained(path)
        assert "\n" not in str(caught.value)

    broken("no model")
    path.write_bytes(b"")
    broken("not a GGUF file")
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    broken("not a GGUF file")
    whole = write(path, tiny()).read_bytes()
    for cut in (len(whole) - 1000, len(whole) // 2, 700, 100, 12, 5):
        path.write_bytes(whole[:cut])
        broken("damaged or cut short")
    broken_version = whole[:4] + (99).to_bytes(4, "little") + whole[8:]
    path.write_bytes(broken_version)
    broken("damaged or cut short.*99")
    path.unlink()
    write(path, tiny(), arch="gpt2")
    broken("architecture 'gpt2' is not supported")


@pytest.mark.peer
@torch.no_grad()
def test_smollm2_file_equals_transformers(smollm2):
    """The GGUF itself, without our bf16 folder between: transformers dequantises it by its own code."""
    from transformers import AutoModelForCausalLM

    path = smollm2.parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    ours = Llama.from_pretrained(path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    row = torch.randint(49152, (1, 64), generator=torch.Generator().manual_seed(0))
    assert (ours(row) - theirs(row).logits).abs().max() <= 2e-3
    folder = Llama.from_pretrained(smollm2, dtype=torch.bfloat16)
    for (name, exact), (_, stored) in zip(ours.named_parameters(), folder.named_parameters(), strict=True):
        assert torch.equal(exact.bfloat16(), stored), name
