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


def split(tokenizer, text, rng):
    """Token ids of `text` in a random split: at each place any token of the vocabulary that its next bytes begin with,
    also one that ends within a character."""
    letters = "".join(word for word, _ in pre_tokenizers.ByteLevel(False, False).pre_tokenize_str(text))  # one a byte
    ids, at, vocabulary = [], 0, tokenizer.backend.get_vocab(with_added_tokens=False)
    while at < len(letters):
        fit = [(piece, i) for piece, i in vocabulary.items() if letters.startswith(piece, at)]
        piece, token = rng.choice(fit)
        ids.append(token)
        at += len(piece)
    return ids


def test_any_split_of_a_text_streams_as_the_text():
    """Stops begin and end inside tokens and inside characters' bytes, contain each other, and follow each other."""
    tokenizer, rng, stopped = byte_level(), random.Random(1), 0
    for _ in range(1500):
        start = rng.randrange(len(TEXT) - 1)
        text = TEXT[start : start + rng.randrange(1, 25)]
        ids = split(tokenizer, text, rng)
        assert tokenizer.decode(ids) == text
        places = [rng.randrange(len(text)) for _ in range(rng.randrange(5))]
        stops = [text[at : at + rng.randrange(1, 8)] for at in places]
        stops += [rng.choice("ab🙂é") * rng.randrange(1, 3) for _ in range(rng.randrange(2))]
        stream = TextStream(tokenizer, stops)
        pieces = []
        for i in ids:
            pieces.append(stream.push(i))
            assert stream.text == "".join(pieces)
            assert text.startswith(stream.text)  # nothing is taken back
        pieces.append(stream.finish())
        assert ("".join(pieces), stream.stopped) == cut(text, stops), (text, ids, stops)
        stopped += stream.stopped
    assert 600 < stopped < 1400


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
