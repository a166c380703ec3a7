"""GGUF: every block type against the gguf package, and a whole file written with it and read back."""

import gguf
import numpy as np
import pytest
import torch
from small_gguf import TEXT, tiny, write

from finetune.errors import UserError
from finetune.lm.io import gguf_tokenizer, load, save
from finetune.lm.io.gguf import GGUFModel, permute, unpermute
from finetune.lm.io.gguf_rope import decimal
from finetune.lm.io.gguf_types import TYPES, dequantize, quantize
from finetune.lm.tokenizer import Tokenizer

WRITTEN = [kind for kind, one in TYPES.items() if one.encode]


@pytest.mark.parametrize("kind", TYPES)
def test_dequantizes_exactly_as_the_gguf_package(kind):
    """Random blocks, bit for bit: scales of all sizes, subnormal, infinite and not a number ones among them."""
    raw = np.random.default_rng(0).integers(
        0, 256, (61, 1024 // TYPES[kind].weights * TYPES[kind].nbytes), dtype=np.uint8
    )
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    ours = dequantize(raw, kind)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert np.isnan(ours).any()
    assert np.abs(ours[np.isfinite(ours)]).max() > 0.1
    assert len(np.unique(ours)) > 1000


@pytest.mark.parametrize("kind", WRITTEN)
def test_quantizes_exactly_as_the_gguf_package(kind):
    """Normal, uniform, constant, zero and tiny weights, and ties at half a step."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((64, 256)).astype(np.float32)
    weights[1] = rng.uniform(-1, 1, 256)
    weights[2], weights[3, :32], weights[4] = 0, 0.5, weights[4] * 1e-7
    weights[5], weights[6] = weights[5] * 1e-30, np.round(weights[6] * 4) / 4
    weights[7] = rng.integers(-8, 8, 256) + 0.5
    theirs = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(quantize(weights, kind), theirs.view(np.uint8))


def test_quantize_refuses():
    with pytest.raises(UserError, match="infinite or not a number"):
        quantize(np.full((1, 32), np.nan, np.float32), "Q8_0")
    for kind in ("F16", "Q8_0", "Q4_0", "Q4_1"):
        with pytest.raises(UserError, match=f"too large for the fp16 numbers of {kind}"):
            quantize(np.full((1, 32), 1e38, np.float32), kind)
    assert np.isfinite(dequantize(quantize(np.full((1, 32), 1e38, np.float32), "BF16"), "BF16")).all()


def test_dequantize_refuses():
    with pytest.raises(UserError, match="IQ2_XS is not supported"):
        dequantize(np.zeros((1, 176), np.uint8), "IQ2_XS")
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
    tokenizer = Tokenizer.train([TEXT], 300)
    path = write(tmp_path / "m.gguf", tiny(), tokenizer=tokenizer)
    again = load.tokenizer(path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.decode(again.encode(TEXT)) == TEXT
    assert again.token_ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # pad = eos is not taken over
    assert load.llama(path).token_ids == {"bos_token_id": 1, "eos_token_id": 2}


def test_ends_of_turns_and_what_llama3_does(tmp_path):
    """add_bos_token, ignore_merges and eot are read; what is saved lists every end of a turn."""
    from finetune.lm.tokenizer import answer_text, stop_ids

    tokenizer, model = Tokenizer.train([TEXT], 300), tiny()
    word = "Ġviz"
    assert tokenizer.encode(" viz") != [299]
    extra = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 8}

    def written(pre, word, **more):
        path = tmp_path / f"{pre}{len(more)}.gguf"
        return write(path, model, tokenizer=tokenizer, pre=pre, last=word, extra=extra | more)

    with_bos = load.tokenizer(written("llama-bpe", word))
    assert with_bos.encode(" viz") == [1, 299]  # one token, though no merge makes it, and bos as llama.cpp puts it
    assert with_bos.encode(" viz", add_special_tokens=False) == [299]
    path = written("llama-bpe", word, **{"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True})
    assert load.tokenizer(path).encode(" viz") == [299, 2]
    assert load.tokenizer(written("gpt-2", word)).encode(" viz")[:1] != [1]
    read = load.llama(path)
    assert read.token_ids["eos_token_id"] == 2
    assert stop_ids(read, with_bos) == {2, 7, 8}
    save.model(read, tmp_path / "saved", with_bos)
    again = load.llama(tmp_path / "saved")
    assert again.generation_ids["eos_token_id"] == [2, 7, 8]
    assert load.tokenizer(tmp_path / "saved").encode(" viz") == [1, 299]
    assert answer_text(with_bos, [299, 7], {7}) == " viz"
    assert answer_text(with_bos, [299, 299], {7}) == " viz viz"


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type 'longrope' is not supported"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ({"split.count": 3}, "m.gguf is one of 3 parts of a split model, but not called NAME-00001-of-00003"),
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


# --- split files


@pytest.fixture
def parts(tmp_path):
    """A model in three parts, written by gguf-py's own splitter, and the model."""
    model = tiny(tied=False)
    whole = write(tmp_path / "whole.gguf", model, tokenizer=Tokenizer.train([TEXT], 300))
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=8)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole.unlink()
    return sorted(tmp_path.glob("m-*.gguf")), model


def test_split_file_from_any_part(parts):
    files, model = parts
    assert [file.name for file in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for file in files:
        again = load.llama(file)
        assert again.config == model.config
        for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(one, other), name
        assert load.tokenizer(file).decode(load.tokenizer(file).encode(TEXT)) == TEXT


def changed(file, key, value):
    """The file with another 16- or 32-bit value of a key."""
    data = bytearray(file.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    width = 2 if key in ("split.no", "split.count") else 4
    data[at : at + width] = value.to_bytes(width, "little")
    file.write_bytes(data)


def test_parts_that_are_missing_or_of_another_model(parts):
    files, _ = parts

    def refused(file, match):
        with pytest.raises(UserError, match=match) as caught:
            load.llama(file)
        assert "\n" not in str(caught.value)

    third = files[2].read_bytes()
    files[2].unlink()
    refused(files[0], r"m-00001-of-00003.gguf is part 00001 of 3; of the others m-00003-of-00003.gguf is not in")
    files[2].write_bytes(files[1].read_bytes())
    refused(files[0], r"m-00003-of-00003.gguf: split.no and split.count are 1 and 3, not 2 and 3")
    changed(files[2], "split.no", 2)
    refused(files[1], r"m-00003-of-00003.gguf: tensor .* is in m-00002-of-00003.gguf too")
    files[2].write_bytes(third)
    changed(files[0], "split.tensors.count", 50)
    refused(files[1], r"m-00001-of-00003.gguf: split.tensors.count is 50, the 3 parts hold 21 tensors")
    changed(files[0], "split.tensors.count", 21)
    load.llama(files[0])
    files[2].write_bytes(third[:-100])
    refused(files[0], r"m-00003-of-00003.gguf is a damaged or cut short GGUF file")
    files[2].write_bytes(third)
    files[1].rename(files[1].with_name("second.gguf"))
    refused(files[1].with_name("second.gguf"), "second.gguf is one of 3 parts .* not called NAME-00001-of-00003.gguf")
    refused(files[2], "m-00003-of-00003.gguf is part 00003 of 3; of the others m-00002-of-00003.gguf is not in")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer 't5' is not supported .only gpt2, llama"),
        ({"tokenizer.ggml.model": 3}, "tokenizer 3 is not supported"),
        ({"tokenizer.ggml.pre": "qwen35"}, "pre-tokenizer 'qwen35' is not supported .only gpt-2, smollm"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "two tokens are 'a'"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type names 2 of 3 tokens"),
        ({"tokenizer.ggml.merges": ["a z"]}, "tokenizer.ggml.merges is not of this vocabulary"),
        ({"tokenizer.ggml.merges": "a b"}, "tokenizer.ggml.merges is 'a b'"),
        ({"tokenizer.ggml.bos_token_id": 3}, "bos_token_id is 3, which is none of the 3 tokens"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores has no scores for 3 tokens"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}, "scores has 1 scores for 3 tokens"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0, float("nan"), 0.0]}, "not a finite number"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.remove_extra_whitespaces": True},
            "scores has no|remove_extra_whitespaces is not supported",
        ),
    ],
)
def test_vocabularies_that_are_refused(tmp_path, changes, match):
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "c"],
        "tokenizer.ggml.merges": [],
    } | changes
    with pytest.raises(UserError, match=f"m.gguf: .*{match}"):
        gguf_tokenizer.read(GGUFModel(tmp_path / "m.gguf", (metadata, {})))


@pytest.mark.parametrize(
    ("name", "extra", "match"),
    [
        ("general.type", "adapter", "m.gguf is of the type 'adapter', not a whole model"),
        ("llama.attention.causal", False, "llama.attention.causal = False is not supported"),
        ("llama.attention.sliding_window", -5, "sliding_window is"),
        ("llama.rope.scaling.factor", 0.25, "factor of at least 1, not 0.25"),
        ("llama.rope.scaling.yarn_beta_fast", "x", "yarn_beta_fast is 'x', not a finite number"),
        ("llama.attention.value_length", 8, "llama.attention.value_length other than the head size"),
    ],
)
def test_more_keys_that_are_refused(tmp_path, name, extra, match):
    file = GGUFModel(write(tmp_path / "m.gguf", tiny()))
    changed = file.metadata | {name: extra}
    with pytest.raises(UserError, match=match):
        GGUFModel(file.path, (changed, file.tensor_infos)).llama_config()
