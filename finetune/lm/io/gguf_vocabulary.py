"""A tokenizer as the metadata of a GGUF file: what gguf_tokenizer.py reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from finetune.errors import UserError
from finetune.lm.io.gguf import TURN_ENDS
from finetune.lm.io.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_of,
)
from finetune.lm.tokenizer import Tokenizer

BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
# Both tokenizers, the one that is written and the one that is read again, must give the same for these.
PROBES = (
    "Hello, world! It's 12345 o'clock; don't SHOUT.",
    "naïve cafe\u0301 Größe, 日本語のテキスト, русский, عربى, हिन्दी",
    "def f(x):\n    return [x ** 2,\t'a' + \"b\"]\n\n\n# end   of  spaces\n",
    "1,234.56 + 7 = 2024-01-31T12:00 🙂👍🏽 ½ ² \u200b\u00a0!",
)


def metadata(tokenizer: Tokenizer, rows: int, stops: Iterable[int]) -> tuple[dict[str, Any], list[str]]:
    """The metadata, and what of the tokenizer it cannot hold, a line each. `rows` of the model's embedding need a token
    each; `stops` are the tokens that end an answer. UserError if another tokenizer would be read from it."""
    backend = tokenizer.backend
    described = json.loads(backend.to_str())
    if described["model"]["type"] != "BPE":
        raise UserError(f"a tokenizer of type {described['model']['type']} cannot be written as GGUF, only BPE")
    added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
    names = {i: token for token, i in backend.get_vocab().items()}
    if names and max(names) >= rows:
        raise UserError(f"the tokenizer has a token {max(names)}, the model's embedding only {rows} rows")
    tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    if bad := next((i for i, token in enumerate(tokens) if "\0" in token), None):
        raise UserError(f"token {bad} of the tokenizer holds a NUL character, at which llama.cpp ends it")
    types = [NORMAL if i in names else UNUSED for i in range(rows)]
    for i, token in added.items():
        types[i] = CONTROL if token.special else USER_DEFINED
    byte_level = (described["decoder"] or {}).get("type") == "ByteLevel"
    found, notes = gpt2(described) if byte_level else spm(described, tokens, types)
    if stripped := [token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word]:
        notes.append(f"GGUF has no place for the white space that {', '.join(stripped[:3])} takes with it")
    bos, eos = around(tokenizer)
    found |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": bos,
        "tokenizer.ggml.add_eos_token": eos,
    }
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    ids["unknown"] = backend.token_to_id(tokenizer.others.get("unk_token", ""))
    ids |= ends(tokens, ids["eos"], stops, notes)
    found |= {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    if tokenizer.chat_template is not None:
        # A block that renders what is in it, for engines that do not know transformers' marker.
        plain = GENERATION.sub(lambda m: m[1] + ("endif" if m[2] else "if true") + m[3], tokenizer.chat_template)
        found["tokenizer.chat_template"] = plain
    return found, notes


def ends(tokens: list[str], eos: int | None, stops: Iterable[int], notes: list[str]) -> dict[str, int | None]:
    """Which of the tokens that end an answer are the end of the text, of a turn, of a message."""
    others = [i for i in sorted(stops) if i != eos]
    others.sort(key=lambda i: tokens[i] not in TURN_ENDS)
    if eos is None and others:
        eos = others.pop(0)
    if len(others) > 2:
        notes.append(
            f"GGUF names three ends of an answer; {', '.join(tokens[i] for i in others[2:])} is not among them"
        )
    return {"eos": eos} | dict(zip(("eot", "eom"), others, strict=False))


def around(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether bos and eos are put around a text; UserError for other tokens."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for bos in (False, True):
        for eos in (False, True):
            ends = [tokenizer.bos_id] * bos + plain + [tokenizer.eos_id] * eos
            if ends == whole:
                return bos, eos
    raise UserError(
        f"the tokenizer makes 'a' {whole}, which is more than bos and eos around {plain}: GGUF has only these"
    )


def canonical(pre: Any) -> Any:
    """A pre-tokenizer's JSON without what does not change the ids."""
    if not isinstance(pre, dict):
        return pre
    if pre["type"] == "Sequence":
        parts = [canonical(part) for part in pre["pretokenizers"]]
        return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}
    if pre["type"] == "Split" and pre["behavior"] == "Removed" and pre["invert"]:  # what does not match: nothing
        return pre | {"behavior": "Isolated", "invert": False}
    return {key: value for key, value in pre.items() if key != "trim_offsets"}


def described(name: str) -> tuple[Any, bool, Any]:
    """Pre-tokenizer, ignore_merges and normalizer of a name, as JSON."""
    one = PRE_TOKENIZERS[name]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = one.cut
    if one.normalizer is not None:
        backend.normalizer = one.normalizer
    found = json.loads(backend.to_str())
    return canonical(found["pre_tokenizer"]), one.ignore_merges, found["normalizer"]


def gpt2(found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The parts of a byte-level BPE's metadata that are its own."""
    model, normalizer = found["model"], found["normalizer"]
    if normalizer is not None and normalizer.get("type") == "Sequence" and len(normalizer["normalizers"]) < 2:
        normalizer = next(iter(normalizer["normalizers"]), None)
    wanted = canonical(found["pre_tokenizer"]), model.get("ignore_merges", False), normalizer
    known = {name: described(name) for name in PRE_TOKENIZERS}
    pre = next((name for name, one in known.items() if one == wanted), None)
    if pre is None:
        same = [name for name, one in known.items() if one[0] == wanted[0]]
        what = json.dumps(found["pre_tokenizer"], ensure_ascii=False)[:200]
        if same:
            what = f"that of {same[0]} with ignore_merges = {wanted[1]} and normalizer {json.dumps(normalizer)[:100]}"
        raise UserError(f"the tokenizer's pre-tokenizer has no name in GGUF: {what}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}, []


def spm(found: dict[str, Any], tokens: list[str], types: list[int]) -> tuple[dict[str, Any], list[str]]:
    """The parts of a SentencePiece vocabulary's metadata that are its own; `tokens` and `types` are completed."""
    model = found["model"]
    if not model.get("byte_fallback"):
        raise UserError("a BPE tokenizer without bytes, neither byte-level nor with byte_fallback, has no form in GGUF")
    prefix, notes = space_prefix(found)
    for i, token in enumerate(tokens):
        if BYTE_NAME.fullmatch(token) and types[i] == NORMAL:
            types[i] = BYTE
        if token == model.get("unk_token"):
            types[i] = UNKNOWN
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    kinds = dict(zip(tokens, types, strict=True))
    ranks: dict[str, int] = {}
    for first, second in merges:
        ranks.setdefault(first + second, len(ranks))
    # A token that no merge makes is not made by its score either, so that any will do: below all others.
    scores = [-float(ranks.get(token, len(ranks) + i)) for i, token in enumerate(tokens)]
    whole = (NORMAL, USER_DEFINED)
    given = [pair for pair in merges if all(kinds.get(part) in whole for part in (*pair, "".join(pair)))]
    if grouped(given, kinds) != grouped(merges_of(tokens, scores, types), kinds):
        raise UserError("the tokenizer's merges do not follow from a score of each token, as SentencePiece has them")
    for i, kind in enumerate(types):
        if kind == USER_DEFINED:
            tokens[i] = tokens[i].replace(SPACE, " ")  # as llama.cpp looks for it
    own = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}
    return own | {"tokenizer.ggml.add_space_prefix": prefix}, notes


def grouped(
    merges: Iterable[tuple[str, ...]], kinds: dict[str, int]
) -> tuple[list[str], dict[str, set[tuple[str, ...]]]]:
    """What the merges make, in order, and of what. Tokens that the user defined are found as a whole before any merge,
    except for runs of spaces, whose order among the others does not count."""
    made: dict[str, set[tuple[str, ...]]] = {}
    order: list[str] = []
    for pair in merges:
        token = "".join(pair)
        if kinds[token] == NORMAL and order[-1:] != [token]:
            order.append(token)
        if kinds[token] == NORMAL or not token.strip(SPACE):
            made.setdefault(token, set()).add(pair)
    return order, made


def space_prefix(found: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space is put before a text, and what of its rule GGUF cannot hold."""
    pre, normalizer = found["pre_tokenizer"], found["normalizer"]
    steps = (
        [normalizer] if normalizer and normalizer["type"] != "Sequence" else (normalizer or {}).get("normalizers", [])
    )
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps in ([{"type": "Prepend", "prepend": SPACE}, spaces], [spaces]):
        no_cut = pre is None or (
            pre["type"] == "Split" and pre["pattern"] == {"String": " "}
        )  # no space is left to cut at
        if no_cut:
            return len(steps) == 2, []
    if not steps and pre is not None and pre["type"] == "Metaspace" and not pre["split"]:
        if pre["prepend_scheme"] == "never":
            return False, []
        return True, [
            "llama.cpp puts a space before every part of a text between special tokens, also before one that begins "
            f"with a space; this tokenizer's rule is {pre['prepend_scheme']!r}"
        ]
    what = json.dumps({"normalizer": normalizer, "pre_tokenizer": pre}, ensure_ascii=False)[:300]
    raise UserError(f"the tokenizer's treatment of spaces has no form in GGUF: {what}")
