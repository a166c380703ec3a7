"""Composites of digits with questions: right answers, splits that share no image, and what is right without seeing."""

import numpy as np
import pytest
import torch

from finetune.data import image_rows
from finetune.diffusion import images
from finetune.errors import UserError
from finetune.vision import pictures
from finetune.vision.pictures import Item, accuracies, blind, in_words

COUNTS = {"train": 300, "validation": 50, "test": 100}


@pytest.fixture(scope="module")
def two():
    return pictures.load("digits", COUNTS, size=16)


@pytest.fixture(scope="module")
def several():
    return pictures.load("digits", COUNTS, least=1, most=4, size=8)


def test_a_picture_is_its_digits_next_to_each_other(two):
    digits = images.load("digits", 16)
    for split in two.values():
        assert split.x.shape[1:] == (1, 16, 32)
        assert split.x.dtype == torch.uint8
        for i in range(0, len(split), 17):
            left, right = split.sources[i].tolist()
            assert torch.equal(split.x[i], torch.cat([digits.x[left], digits.x[right]], -1))
            assert split.digits[i].tolist() == digits.labels[[left, right]].tolist()
    assert pictures.load("mnist", {"test": 2})["test"].x.shape == (2, 1, 28, 56)


def test_answers_are_those_of_the_digits_that_are_shown(two, several):
    numbers = {in_words(i): i for i in range(60)}
    for splits, kinds in ((two, 4), (several, 5)):
        split = splits["test"]
        assert len(split.items) == kinds * len(split)
        for item in split.items:
            shown = [d for d in split.digits[item.picture].tolist() if d >= 0]
            expected = {"left": shown[0], "right": shown[-1], "sum": sum(shown), "larger": max(shown),
                        "count": len(shown)}  # fmt: skip
            assert numbers[item.answer] == expected[item.kind]


def test_the_number_of_digits_varies_and_empty_places_are_black(several):
    split = several["train"]
    shown = (split.digits >= 0).sum(1)
    assert sorted(shown.unique().tolist()) == [1, 2, 3, 4]
    assert shown.bincount()[1:].min() > 40
    black = split.x.unflatten(-1, (4, 8)).amax((1, 2, 4)) == 0
    assert torch.equal(black, split.digits < 0)
    assert (split.digits >= 0).float().mean(0).min() > 0.5  # any place may have one
    assert torch.equal(split.digits < 0, split.sources < 0)


@pytest.mark.parametrize("source", ["digits", "mnist"])
def test_no_digit_image_is_in_two_splits(source):
    found = images.load(source)
    splits = pictures.load(source, COUNTS | {"train": 3000}, size=found.x.shape[-1])
    pixels = {
        name: {found.x[i].numpy().tobytes() for i in split.sources.unique().tolist()} for name, split in splits.items()
    }
    assert len(pixels["train"]) > 1000
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not pixels[one] & pixels[other]
    shares = [pictures.split_of(x.numpy().tobytes()) for x in found.x]
    for name, share in pictures.SHARES.items():
        assert shares.count(name) / len(shares) == pytest.approx(share, abs=0.04)


def test_splits_are_fixed_and_hashed(two):
    again = pictures.load("digits", COUNTS, size=16)
    assert all(torch.equal(again[name].x, two[name].x) for name in COUNTS)
    assert [again[name].digest for name in COUNTS] == [two[name].digest for name in COUNTS]
    assert pictures.load("digits", {"test": 100}, size=8)["test"].digest == two["test"].digest  # before scaling
    other = pictures.load("digits", COUNTS, size=16, seed=1)
    assert other["train"].digest != two["train"].digest
    assert other["test"].digest == two["test"].digest
    assert pictures.load("digits", {"test": 101}, size=8)["test"].digest != two["test"].digest
    # of this data on every machine: a change of it changes what results mean
    assert two["test"].digest[:16] == "f0dcbff0bbfc831a"


def test_digits_are_equally_frequent():
    split = pictures.load("digits", {"train": 5000}, size=8)["train"]
    assert (split.digits.flatten().bincount() / split.digits.numel() - 0.1).abs().max() < 0.012


def test_the_blind_baseline_by_counting():
    train = [Item(0, "left", "?", answer) for answer in ("one", "two", "two")]
    train += [Item(0, "sum", "?", answer) for answer in ("nine", "ten")]
    test = [Item(0, "left", "?", "two"), Item(1, "left", "?", "one"), Item(0, "sum", "?", "nine"),
            Item(1, "sum", "?", "nine")]  # fmt: skip
    assert blind(train, test) == {"left": 0.5, "sum": 1.0, "all": 0.75}  # of two as frequent, the first by name
    assert accuracies(test, ["Two ", "two", "", "nine"]) == {"left": 0.5, "sum": 0.5, "all": 0.5}


def test_the_blind_baseline_of_two_digits_is_that_of_chance():
    splits = pictures.load("digits", {"train": 4000, "test": 2000}, size=8)
    found = blind(splits["train"].items, splits["test"].items)
    assert found["left"] == pytest.approx(0.10, abs=0.03)
    assert found["right"] == pytest.approx(0.10, abs=0.03)
    assert found["sum"] == pytest.approx(0.10, abs=0.03)
    assert found["larger"] == pytest.approx(0.19, abs=0.03)


def test_a_written_split_is_read_as_image_rows(several, tmp_path):
    split = several["validation"]
    found = image_rows.read(pictures.write(split, tmp_path / "new"))
    assert len(found) == len(split.items)
    for row, item in list(zip(found, split.items, strict=True))[::29]:
        assert row.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": f"\n{item.question}"}]
        assert row.messages[1]["content"][0]["text"] == item.answer
        (image,) = row.open()
        assert torch.equal(torch.tensor(np.asarray(image))[None], split.x[item.picture])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"source": "mnists"}, "digits or mnist, not of 'mnists'; did you mean 'mnist'?"),
        ({"least": 3}, "3 to 2 digits"),
        ({"most": 7}, "a picture has 1 to 6"),
        ({"kinds": ["middle"]}, "there is no question 'middle'"),
        ({"kinds": ["count"]}, "would always be two"),
        ({"counts": {"dev": 3}}, "there is no split 'dev'"),
        ({"counts": {"test": 0}}, "at least 1 picture, not 0"),
        ({"size": 0}, "sides of 1 to 512 pixels"),
    ],
)
def test_what_cannot_be_made_is_one_line(wrong, says):
    with pytest.raises(UserError) as caught:
        pictures.load(**wrong)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_in_words():
    assert [in_words(n) for n in (0, 7, 18, 20, 21, 54)] == [
        "zero", "seven", "eighteen", "twenty", "twenty-one", "fifty-four",
    ]  # fmt: skip
