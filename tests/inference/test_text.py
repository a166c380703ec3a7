"""Streaming as a property: whatever the tokenizer, the split into tokens and the stop strings, the pieces joined are
the text up to the first stop string."""

import random

import pytest
from small_served import TEXT, byte_level, sentencepiece
from tokenizers import pre_tokenizers

from finetune.errors import UserError
from finetune.inference.text import TextStream


def cut(text, stops):
    """`text` up to the stop string whose end comes first, character by character."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_pieces_joined_are_the_text_up_to_the_first_stop(make):
    tokenizer, rng, stopped = make(), random.Random(0), 0
    for trial in range(1500):
        if trial % 3 or make is sentencepiece:  # whose library replaces a whole run of bytes for one that is wrong
            ids = [i for _ in range(3) for i in tokenizer.encode(TEXT[rng.randrange(len(TEXT)) :][: rng.randrange(12)])]
        else:  # bytes in any order, whole characters or not
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        places = [rng.randrange(len(whole) + 1) for _ in range(rng.randrange(4))]
        stops = [stop for at in places if (stop := whole[at : at + rng.randrange(1, 6)])]
        stream = TextStream(tokenizer, stops)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.finish() == cut(whole, stops)[0], (ids, stops)
        assert stream.stopped == cut(whole, stops)[1]
        stopped += stream.stopped
    assert stopped > 300


def test_text_is_released_as_soon_as_it_is_certain():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, ["abc"])
    ids = [tokenizer.encode(text)[0] for text in "xaby"]
    assert [stream.push(i) for i in ids] == ["x", "", "", "aby"]
    smile = TextStream(tokenizer)
    (word,) = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("🙃")  # a character for each byte
    assert [smile.push(tokenizer.backend.token_to_id(byte)) for byte in word[0]] == ["", "", "", "🙃"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="empty"):
        TextStream(byte_level(), ["a", ""])
