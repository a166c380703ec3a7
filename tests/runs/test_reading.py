"""The typed reader: every failure is one line that names the file, the key, the value and what is allowed."""

import os

import msgspec
import pytest

from finetune.errors import UserError
from finetune.runs import reading


class Shape(msgspec.Struct):
    layers: reading.Count
    eps: reading.Positive = 1e-5
    map: dict[str, str] = {}
    ids: list[int] = []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": 3.0}', "c.json: layers is 3.0: expected `int`, got `float`: save it again"),
        ('{"layers": true}', "layers is True: expected `int`, got `bool`"),
        ('{"layers": 0}', "layers is 0: expected `int` >= 1"),
        ('{"layers": 99999999999}', "layers is 99999999999: expected `int` <= 2147483647"),
        ('{"layers": 1, "eps": -1}', "eps is -1: expected `float` > 0.0"),
        ('{"layers": 1, "eps": NaN}', "is not JSON"),
        ('{"layers": 1, "eps": 1e999}', "eps: number out of range"),
        ('{"layers": 1, "ids": [1, "x"]}', "ids[1] is 'x': expected `int`, got `str`"),
        ('{"layers": 1, "map": {"a": 3}}', "map[...]: expected `str`, got `int`"),
        ("{}", "missing required field `layers`"),
        ("[1]", "expected `object`, got `array`"),
        ("", "is not JSON"),
        ('{"layers": 1, "more": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_is_not_what_was_asked_for(tmp_path, text, message):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        reading.json_file(path, Shape, "save it again")
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_asked_for_comes_typed(tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(b'\xef\xbb\xbf{"layers": 2, "eps": 1, "unknown": [1]}')
    assert reading.json_file(path, Shape) == Shape(layers=2, eps=1.0)


def test_values_that_are_parsed_already_are_finite(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("layers = 1\n[map]\n[[rows]]\nvalue = inf\n")
    with pytest.raises(UserError, match=r"c\.toml: rows\[0\]\.value is not a finite number"):
        reading.toml_file(path, Shape)
    with pytest.raises(UserError, match="eps is not a finite number"):
        reading.convert({"layers": 1, "eps": float("nan")}, Shape, "metadata")


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "large").write_bytes(b"x" * 11)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for path, message in (
        (pipe, "is a pipe or device, not a file"),  # and does not wait for a writer
        ("/dev/zero", "is a pipe or device, not a file"),
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "none", "there is no such file"),
        (tmp_path / "large", "has 11 bytes, more than the 10 that are read"),
        (tmp_path / "x\0y", "is no file name"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            reading.file_bytes(path, limit=10)
    with pytest.raises(UserError, match="byte 4 is not UTF-8"):
        reading.text_file(tmp_path / "latin")
