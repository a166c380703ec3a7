"""The tokenizers of the families, built here as transformers builds theirs, on 5,000 random texts each: from a folder
that transformers saved, and from a GGUF file that gguf-py wrote."""

import functools
import json
import unicodedata
from pathlib import Path

import gguf
import pytest
from random_texts import texts
from small_gguf import tiny
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from finetune.errors import UserError
from finetune.lm.io import gguf_vocabulary, gguf_write, load
from finetune.lm.io.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from finetune.lm.tokenizer import Tokenizer

pytestmark = pytest.mark.peer
ROOT = Path(__file__).parents[2]
COUNT = 5000
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def corpus():
    """Prose, Chinese, code, and texts like those of the test, from other seeds."""
    files = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "finetune/lm").glob("*.py"))[:6]]
    made = texts(1500, seed=7)
    for each in ("\0", "<0x0A>"):  # what real vocabularies do not have; GGUF cannot hold a token with NUL
        made = [text.replace(each, "") for text in made]
    return [path.read_text() for path in files] + made


@functools.cache
def byte_vocabulary(first=()):
    """Vocabulary and merges over bytes. The words that it is trained on are cut only at white space, so that merges go
    across the cuts of every family, and a wrong cut shows."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s*\S+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=2500, special_tokens=list(first), initial_alphabet=alphabet, show_progress=False
        ),
    )
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@functools.cache
def pieces(first, words=r"▁*[^▁]+|▁+"):
    """A vocabulary in SentencePiece's manner: `first`, the bytes, then pieces, the earliest merged first."""
    backend = Backend(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    known = [*first, *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=2500, special_tokens=known, limit_alphabet=150, show_progress=False)
    )
    return backend.get_vocab()


def bos_first(backend, bos):
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def byte_level(pre, specials, *, ignore_merges=False, bos=None, **names):
    from transformers import PreTrainedTokenizerFast

    vocab, merges = byte_vocabulary(specials)
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if bos:
        bos_first(backend, bos)
        names["bos_token"] = bos
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def llama3():
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return byte_level(
        split(LLAMA3), specials, ignore_merges=True, bos=specials[0], eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=True,
    )  # fmt: skip


def tekken():
    specials = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    return byte_level(split(TEKKEN), specials, ignore_merges=True, bos="<s>", eos_token="</s>", unk_token="<unk>")


def smollm():
    digits = pre_tokenizers.Digits(individual_digits=True)
    pre = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return byte_level(pre, specials, bos_token=specials[1], eos_token=specials[2], pad_token=specials[2])


def gpt2():
    from transformers import GPT2Tokenizer

    vocab, merges = byte_vocabulary(("<|endoftext|>",))
    return GPT2Tokenizer(vocab=vocab, merges=merges)


def qwen():
    from transformers import Qwen2Tokenizer

    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocab, merges = byte_vocabulary(specials)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", add_bos_token=False)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False), "<tool_call>"])
    return tokenizer


def merges_by_rank(vocab, specials):
    from transformers.tokenization_utils_base import generate_merges

    return generate_merges(vocab, skip_tokens=[*specials, *(f"<0x{i:02X}>" for i in range(256))])


def llama2():
    """As the hub has it: a space before every part of the text, by the normalizer."""
    from transformers import PreTrainedTokenizerFast

    specials = ("<unk>", "<s>", "</s>")
    vocab = pieces(specials)
    merges = merges_by_rank(vocab, specials)
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    bos_first(backend, "<s>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama2_of_transformers_5():
    """A space before the first part only, by the pre-tokenizer."""
    from transformers import LlamaTokenizer

    specials = ("<unk>", "<s>", "</s>")
    vocab = pieces(specials)
    return LlamaTokenizer(vocab=vocab, merges=merges_by_rank(vocab, specials), add_bos_token=True)


def gemma():
    from transformers import GemmaTokenizer

    runs = (*("▁" * n for n in range(2, 9)), *("\n" * n for n in range(1, 5)), "\t\t", "<table>")
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    vocab = pieces((*specials, *runs), r"▁?[^▁]+|▁+")  # no run of spaces begins a piece
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges_by_rank(vocab, specials), add_bos_token=True)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in runs])
    return tokenizer


FAMILIES = {
    "llama3": (llama3, "llama-bpe"),
    "tekken": (tekken, "tekken"),
    "smollm": (smollm, "smollm"),
    "gpt2": (gpt2, "gpt-2"),
    "qwen": (qwen, "qwen2"),
    "llama2": (llama2, ""),
    "llama2 of transformers 5": (llama2_of_transformers_5, None),
    "gemma": (gemma, ""),
}


def write_gguf(path, peer, pre):
    """The vocabulary as llama.cpp's converters write it."""
    backend, added = peer.backend_tokenizer, peer.backend_tokenizer.get_added_tokens_decoder()
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    model = json.loads(backend.to_str())["model"]
    types = []
    for i, token in enumerate(tokens):
        kind = NORMAL if i not in added else CONTROL if added[i].special else USER_DEFINED
        if not pre:
            kind = BYTE if token.startswith("<0x") and len(token) == 6 else UNKNOWN if token == "<unk>" else kind
        types.append(kind)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2" if pre else "llama")
    writer.add_tokenizer_pre(pre or "default")
    if pre:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    else:
        writer.add_token_scores([-1000.0 if kind != NORMAL else -float(i) for i, kind in enumerate(types)])
        writer.add_add_space_prefix(json.loads(backend.to_str())["normalizer"]["type"] == "Sequence")
    writer.add_token_list(
        [t.replace("▁", " ") if k == USER_DEFINED and not pre else t for t, k in zip(tokens, types, strict=True)]
    )
    writer.add_token_types(types)
    for token, add in (
        (peer.bos_token_id, writer.add_bos_token_id), (peer.eos_token_id, writer.add_eos_token_id),
        (peer.pad_token_id, writer.add_pad_token_id), (peer.unk_token_id, writer.add_unk_token_id),
    ):  # fmt: skip
        if token is not None:
            add(token)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check(peer, ours, rows):
    """The same ids, with and without what is put around a text, and the same text of them."""
    wanted = peer(rows)["input_ids"]
    found = [encoding.ids for encoding in ours.backend.encode_batch(rows)]
    wrong = [row for row, one, other in zip(rows, wanted, found, strict=True) if one != other]
    assert not wrong, (len(wrong), wrong[0], peer.tokenize(wrong[0]), ours.backend.encode(wrong[0]).tokens)
    few = rows[:500]
    plain = [encoding.ids for encoding in ours.backend.encode_batch(few, add_special_tokens=False)]
    assert plain == peer(few, add_special_tokens=False)["input_ids"]
    assert ours.backend.decode_batch(found, skip_special_tokens=False) == peer.batch_decode(wanted)
    mine, theirs = (each[:500] for each in (found, wanted))
    assert ours.backend.decode_batch(mine) == peer.batch_decode(theirs, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers(tmp_path, family):
    from transformers import AutoTokenizer

    build, pre = FAMILIES[family]
    build().save_pretrained(tmp_path)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    names = [token.content for token in peer.added_tokens_decoder.values()]
    rows = [*texts(COUNT, names), "", " ", "a", " a", "▁a", names[0], f" {names[-1]} a"]
    ours = load.tokenizer(tmp_path)
    check(peer, ours, rows)
    for name in ("bos", "eos", "pad"):
        assert getattr(ours, name) == getattr(peer, f"{name}_token"), name
    if pre is None:
        return
    read = load.tokenizer(write_gguf(tmp_path / "m.gguf", peer, pre))
    check(peer, read, rows)
    assert (read.bos, read.eos) == (ours.bos, ours.eos)
    # What we write ourselves describes the same tokenizer, under the same name.
    metadata, notes = gguf_vocabulary.metadata(ours, ours.vocab_size, [])
    assert metadata["tokenizer.ggml.pre"] == pre or not pre
    assert metadata["tokenizer.ggml.token_type"] == read_types(tmp_path / "m.gguf")
    assert not notes


def read_types(path):
    return gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"].contents()


@pytest.mark.parametrize(
    "flags", [{"add_eos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
@pytest.mark.parametrize("family", ["llama2", "smollm"])
def test_flags_of_the_settings(tmp_path, family, flags):
    """tokenizer.json says what is put around a text, whatever older settings say."""
    from transformers import AutoTokenizer

    FAMILIES[family][0]().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | flags))
    check(AutoTokenizer.from_pretrained(tmp_path), load.tokenizer(tmp_path), texts(50, ["<s>", "<|im_end|>"]))


def test_special_tokens_that_only_the_settings_name(tmp_path):
    from transformers import AutoTokenizer

    smollm().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    written = json.loads(file.read_text())
    removed = written["added_tokens"].pop(1)["content"]
    file.write_text(json.dumps(written))
    peer, ours = AutoTokenizer.from_pretrained(tmp_path), load.tokenizer(tmp_path)
    assert ours.encode(f"a{removed}b")[1] == ours.bos_id == 1
    check(peer, ours, texts(200, [removed]))
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["added_tokens_decoder"] = {"7": {"content": "<new>", "special": True}}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="gives '<new>' the id 7, in the vocabulary it has"):
        load.tokenizer(tmp_path)


def proto(pieces, trainer=None, normalizer=None):
    """A tokenizer.model: pieces (text, score, type) and settings by field number."""
    from transformers.utils.import_utils import is_protobuf_available

    assert is_protobuf_available()
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    for part, values in ((model.trainer_spec, trainer), (model.normalizer_spec, normalizer)):
        for name, value in (values or {}).items():
            setattr(part, name, value)
    return model.SerializeToString()


def test_sentencepiece_file(tmp_path):
    """A folder with tokenizer.model only is the same tokenizer as the one that was converted from it."""
    peer = llama2()
    vocab = peer.get_vocab()
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL} | {f"<0x{i:02X}>": BYTE for i in range(256)}
    pieces = [(token, -float(i), kinds.get(token, NORMAL)) for token, i in sorted(vocab.items(), key=lambda x: x[1])]
    trainer, normalizer = {"model_type": 2, "byte_fallback": True}, {"remove_extra_whitespaces": False}
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto(pieces, trainer, normalizer))
    ours = load.tokenizer(tmp_path)
    check(peer, ours, texts(1000, ["<s>", "</s>", "<unk>"]))
    assert (ours.bos, ours.eos, ours.pad) == ("<s>", "</s>", None)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "pad_token": "<unk>"}')
    assert load.tokenizer(tmp_path).encode("a") == ours.encode("a", add_special_tokens=False)
    assert load.tokenizer(tmp_path).pad_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    assert load.tokenizer(tmp_path).encode("a") == [*ours.encode("a"), 2]
    for data, match in (
        (proto(pieces, trainer | {"model_type": 1}, normalizer), "kind Unigram, only BPE is read: save .* fast form"),
        (proto(pieces, trainer), "normalizes texts, which is not supported"),
        (file.read_bytes()[:-3], "not a tokenizer of SentencePiece, or damaged"),
        (b"", "not a tokenizer of SentencePiece, or damaged"),
        (b"\xff" * 40, "not a tokenizer of SentencePiece, or damaged"),
        (file.read_bytes() + bytes([11]), "not a tokenizer of SentencePiece, or damaged"),
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match=match):
            load.tokenizer(tmp_path)
    file.unlink()
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds only tekken.json, which is not read: save .*save_pretrained"):
        load.tokenizer(tmp_path)


def test_a_token_with_nul_is_refused():
    vocab = dict(pieces(("<unk>",)))
    vocab["a\0"] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    with pytest.raises(UserError, match=f"token {len(vocab) - 1} of the tokenizer holds a NUL"):
        gguf_vocabulary.metadata(Tokenizer(backend), len(vocab), [])


def left_out(letter, marks):
    """Characters that are newer than llama.cpp's tables; with `marks`, combining ones and those that NFC changes."""
    kind = unicodedata.category(letter)
    return kind == "Cn" or (marks and (kind[0] == "M" or not unicodedata.is_normalized("NFC", letter)))


@pytest.mark.long
@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name][1] is not None])
def test_llama_cpp_gives_the_same_ids(tmp_path, family):
    """From the file that we write. It does not know combining marks in Mistral's cuts, nor Qwen's normalization: these
    two are compared on texts without them."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="make longtest installs llama-cpp-python")
    FAMILIES[family][0]().save_pretrained(tmp_path)
    tokenizer = load.tokenizer(tmp_path)
    gguf_write.write(tiny(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "m.gguf", "f16")
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    rows = texts(COUNT, [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()], seed=3)
    marks = family in ("tekken", "qwen")
    rows = [row for row in rows if not any(left_out(letter, marks) for letter in row)]
    if family == "gemma":  # whose runs of spaces are tokens that llama.cpp looks for as spaces, not as ▁
        rows = [row for row in rows if "▁" not in row]
    assert len(rows) > COUNT / 2
    wrong = [
        row
        for row in rows
        if row and theirs.tokenize(row.encode(), add_bos=True, special=True) != tokenizer.encode(row)
    ]
    assert not wrong, (len(wrong), wrong[0])
    theirs.close()
