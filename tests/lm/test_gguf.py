"""GGUF: every block type against the gguf package, and a whole file written with it and read back."""

import gguf
import numpy as np
import pytest
import torch
from small_gguf import TEXT, permute, tiny, write

from finetune.errors import UserError
from finetune.lm.io import load, save
from finetune.lm.io.gguf import TYPES, GGUFModel, decimal, dequantize, unpermute

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
def test_dequantizes_exactly_as_the_gguf_package(kind):
    raw = random_bytes(kind)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    if kind in ("F32", "F16"):  # which it leaves to the reader
        theirs = raw.view(np.float32 if kind == "F32" else np.float16).astype(np.float32)
    ours = dequantize(raw, kind)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.array_equal(ours, theirs)
    assert np.abs(ours).max() > 0.1


def test_dequantize_refuses():
    with pytest.raises(UserError, match="Q5_K is not supported"):
        dequantize(np.zeros((1, 176), np.uint8), "Q5_K")
    with pytest.raises(ValueError, match="whole number"):
        dequantize(np.zeros((1, 35), np.uint8), "Q8_0")


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
    again = load.llama(write(tmp_path / "m.gguf", model))
    assert again.config == model.config
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("kind", "error"), [("Q8_0", 0.02), ("Q4_1", 0.2), ("Q4_0", 0.3), ("BF16", 0.01), ("F16", 1e-3)]
)
def test_quantized_file(tmp_path, kind, error):
    model = tiny()
    again = load.llama(write(tmp_path / "m.gguf", model, kind))
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert (one - other).abs().max() <= error, name


def test_tokenizer_there_and_back(tmp_path):
    from finetune.lm.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([TEXT], 300)
    path = write(tmp_path / "m.gguf", tiny(), tokenizer=tokenizer)
    again = load.tokenizer(path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.decode(again.encode(TEXT)) == TEXT
    assert again.token_ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # pad = eos is not taken over
    assert load.llama(path).token_ids == {"bos_token_id": 1, "eos_token_id": 2}


def test_ends_of_turns_and_what_llama3_does(tmp_path):
    """add_bos_token, ignore_merges and eot are read; what is saved lists every end of a turn."""
    from finetune.lm.generate import answer_text, stop_ids
    from finetune.lm.tokenizer import Tokenizer

    tokenizer, model = Tokenizer.train([TEXT], 300), tiny()
    word = "Ġhello"
    assert tokenizer.encode(" hello") != [299]
    extra = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 8}

    def written(pre, word, **more):
        path = tmp_path / f"{pre}{len(more)}.gguf"
        return write(path, model, tokenizer=tokenizer, pre=pre, last=word, extra=extra | more)

    with_bos = load.tokenizer(written("llama-bpe", word))
    assert with_bos.encode(" hello") == [1, 299]  # one token, though no merge makes it, and bos as llama.cpp puts it
    assert with_bos.encode(" hello", add_special_tokens=False) == [299]
    path = written("llama-bpe", word, **{"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True})
    assert load.tokenizer(path).encode(" hello") == [299, 2]
    assert load.tokenizer(written("default", word)).encode(" hello")[:1] != [1]
    read = load.llama(path)
    assert read.token_ids["eos_token_id"] == 2
    assert stop_ids(read, with_bos) == {2, 7, 8}
    save.model(read, tmp_path / "saved", with_bos)
    again = load.llama(tmp_path / "saved")
    assert again.generation_ids["eos_token_id"] == [2, 7, 8]
    assert load.tokenizer(tmp_path / "saved").encode(" hello") == [1, 299]
    assert answer_text(with_bos, [299, 7], {7}) == " hello"
    assert answer_text(with_bos, [299, 299], {7}) == " hello hello"


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ({"split.count": 3}, "m.gguf is one of 3 parts of a split model"),
        ({"llama.rope.freq_base": -1.0}, "llama.rope.freq_base is -1.0: expected `float` > 0"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base is not a finite number"),
        ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, "rms_epsilon is not a finite number"),
        ({"llama.attention.layer_norm_rms_epsilon": "1e-5"}, "rms_epsilon is '1e-5': expected `float`"),
        ({"llama.block_count": 1 << 31}, "llama.block_count is 2147483648"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"llama.attention.head_count_kv": 3}, "multiple of kv_heads"),
        ({"llama.context_length": "x"}, "llama.context_length is 'x'"),
    ],
)
def test_unsupported_key_is_named(tmp_path, extra, match):
    with pytest.raises(UserError, match=match):
        load.llama(write(tmp_path / "m.gguf", tiny(), extra=extra))


def test_bad_files(tmp_path):
    path = tmp_path / "m.gguf"

    def broken(match):
        with pytest.raises(UserError, match=match) as caught:
            load.llama(path)
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
    write(path, tiny(), arch="none", extra={"split.count": 2})  # a later part names no architecture
    broken("m.gguf is one of 2 parts of a split model")
    path.unlink()
    write(path, tiny(), arch="gpt2")
    broken("architecture 'gpt2' is not supported")


def test_every_changed_byte_of_the_header_is_read_or_refused(tmp_path):
    """One line, no hang, no gigabytes: every byte before the weights set to 255, every count and offset made absurd."""
    path = tmp_path / "m.gguf"
    whole = write(path, tiny(vocab_size=16, dim=8, layers=1, heads=2, kv_heads=1, hidden=8)).read_bytes()
    first = min(info.start for info in GGUFModel(path).tensor_infos.values())
    changed = [whole[:at] + b"\xff" + whole[at + 1 :] for at in range(4, first, 2)]
    changed += [whole[:at] + (1 << 62).to_bytes(8, "little") + whole[at + 8 :] for at in range(8, first - 8, 3)]
    refused = []
    for content in changed:
        path.write_bytes(content)
        try:
            load.llama(path)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 300
    assert not [text for text in refused if "\n" in text or len(text) > 500 or "m.gguf" not in text]


def test_misplaced_tensors_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    whole = write(path, tiny(vocab_size=16, dim=8, layers=1, heads=2, kv_heads=1, hidden=8)).read_bytes()
    infos = GGUFModel(path).tensor_infos
    first = min(info.start for info in infos.values())
    name = b"output_norm.weight"
    at = whole.index(name) + len(name) + 4 + 8 + 4  # dimensions, one size, type
    assert int.from_bytes(whole[at : at + 8], "little") == infos[name.decode()].start - first
    for offset, match in ((4, "not a multiple of 32"), (1 << 40, "ends at byte"), (len(whole) - first, "ends at byte")):
        path.write_bytes(whole[:at] + offset.to_bytes(8, "little") + whole[at + 8 :])
        with pytest.raises(UserError, match=match):
            load.llama(path)
    path.write_bytes(whole[: at - 4] + (12).to_bytes(4, "little") + whole[at:])  # Q4_K: blocks of 256
    with pytest.raises(UserError, match="not made of whole blocks of 256"):
        load.llama(path)
    path.write_bytes(whole[: at - 4] + (26).to_bytes(4, "little") + whole[at:])
    with pytest.raises(
        UserError, match=r"m\.gguf: tensor output_norm.weight is of GGUF type I32, which is not supported"
    ):
        load.llama(path)


@pytest.mark.peer
@torch.no_grad()
def test_smollm2_file_equals_transformers(smollm2):
    """The GGUF itself, without our bf16 folder between: transformers dequantizes it by its own code."""
    from transformers import AutoModelForCausalLM

    path = smollm2.parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    ours = load.llama(path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    row = torch.randint(49152, (1, 64), generator=torch.Generator().manual_seed(0))
    assert (ours(row) - theirs(row).logits).abs().max() <= 2e-3
    folder = load.llama(smollm2, dtype=torch.bfloat16)
    for (name, exact), (_, stored) in zip(ours.named_parameters(), folder.named_parameters(), strict=True):
        assert torch.equal(exact.bfloat16(), stored), name
