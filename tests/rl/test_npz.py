"""npz files that are broken in 370 ways, for every reader of one: a one-line error each, in bounded time and memory."""

import io
import os
import struct
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.rl.envs import logged_data, npz
from finetune.rl.tabular import mdp as tables

LOG = {
    "observations": np.arange(12.0, dtype=np.float32).reshape(6, 2), "actions": np.array([0, 1, 0, 1, 0, 1]),
    "rewards": np.ones(6), "terminations": np.arange(6) == 5, "truncations": np.zeros(6, bool),
    "next_observations": np.ones((6, 2), np.float32),
}  # fmt: skip
TABLE = {"P": np.full((3, 2, 3), 1 / 3), "R": np.arange(6.0).reshape(3, 2), "gamma": np.array(0.9)}
KINDS = {"log": (LOG, "actions", logged_data.load), "table": (TABLE, "P", tables.load)}


def npy(array):
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def raw(header, body=b"", version=(1, 0), length=None):
    """A member with this text for a header."""
    text = header.encode()
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", size) + text + body


def described(shape, type_="'<f8'", order="False"):
    return f"{{'descr': {type_}, 'fortran_order': {order}, 'shape': {shape}}}\n"


def packed(members, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return out.getvalue()


def with_member(arrays, name, content, method=zipfile.ZIP_STORED):
    return packed([(f"{n}.npy", content if n == name else npy(a)) for n, a in arrays.items()], method)


def patched(data, at, value):
    """The central directory's entry of the first member, changed at this byte."""
    begin = data.index(b"PK\x01\x02")
    return data[: begin + at] + value + data[begin + at + len(value) :]


def broken(arrays, name):
    """(what, bytes) of files of these arrays in which `name` is wrong, or the whole file is."""
    n = np.asarray(arrays[name]).size
    headers = {
        "absurd shape": described((10**6, 10**6, 10**6)), "absurd empty shape": described((0, 2**62, 2**62, 2**62)),
        "negative shape": described((-6,)), "shape of bools": described((True,)), "shape of floats": described((6.0,)),
        "shape of text": described("'six'"), "no shape": "{'descr': '<f8'}\n", "a list": "[1, 2]\n", "a name": "x\n",
        "a call": "__import__('os').getcwd()\n", "nothing": "", "spaces": " " * 4000, "not closed": "{'descr': '<f8'",
        "deep": "(" * 2000 + ")" * 2000, "deeper": "[" * 4000, "minus": "-" * 4000 + "1", "long": " " * 9000,
        "unknown type": described((n,), "'<z9'"), "type of objects": described((n,), "'|O'"),
        "endless text": described((n,), "'<U500000000'"), "fields": described((n,), "[('a', '<f8'), ('b', '|O')]"),
        "subarray": described((n,), "('<f8', (10**9,))"), "type None": described((n,), "None"),
        "many axes": described((1,) * 40), "void": described((n,), "'|V0'"), "NUL": "\0" * 60, "latin": "é" * 40,
        "dates": described((n,), "'<M8[s]'"), "quads": described((n,), "'<c16'"),
    }  # fmt: skip
    for what, header in headers.items():
        yield f"header: {what}", with_member(arrays, name, raw(header, bytes(8 * n)))
    for version in ((0, 0), (3, 0), (9, 9)):
        yield f"version {version}", with_member(arrays, name, raw(described((n,)), bytes(8 * n), version))
    yield "header length", with_member(arrays, name, raw(described((n,)), bytes(8 * n), (2, 0), 2**32 - 1))
    yield "too few numbers", with_member(arrays, name, raw(described((n,)), bytes(8 * n - 1)))
    yield "too many numbers", with_member(arrays, name, raw(described((n,)), bytes(8 * n + 1)))
    yield "no array", with_member(arrays, name, b"rewards")
    yield "empty member", with_member(arrays, name, b"")
    yield "objects", with_member(arrays, name, npy(np.array([{}] * n, object)))
    yield "strange bools", with_member(arrays, name, raw(described((n,), "'|b1'"), bytes([7] * n)))
    full = [np.full(np.shape(arrays[name]), value) for value in (np.nan, np.inf, 1e300, np.uint64(2**64 - 1))]
    for kind in (np.array("text"), np.zeros(0), np.array(3.0), np.zeros((2, 2, 2, 2)), np.zeros(n, complex), *full):
        yield f"{kind.dtype} {kind.shape}", with_member(arrays, name, npy(kind))
    zeros = raw(described((10**7, 10)), bytes(10**7))
    yield "bomb by the header", with_member(arrays, name, zeros, zipfile.ZIP_DEFLATED)
    zeros = raw(described((50 << 20,), "'|u1'"), bytes(50 << 20))
    yield "bomb", with_member(arrays, name, zeros, zipfile.ZIP_DEFLATED)
    good = packed([(f"{name}.npy", npy(arrays[name]))] + [(f"{n}.npy", npy(a)) for n, a in arrays.items() if n != name])
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"method {method}", with_member(arrays, name, npy(arrays[name]), method)
    for what, at, value in (("method 99", 10, b"\x63\0"), ("encrypted", 8, b"\x01\0"), ("size", 24, b"\xff" * 4),
                            ("smaller size", 24, b"\x40\0\0\0"), ("checksum", 16, b"\0\0\0\0"),
                            ("offset", 42, b"\xff\xff\xff\x7f"), ("name length", 28, b"\xff\xff")):  # fmt: skip
        yield f"directory: {what}", patched(good, at, value)
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = bomb.compress(npy(arrays[name]) + bytes(20 << 20)) + bomb.flush()
    small = packed([(f"{name}.npy", npy(arrays[name]))], zipfile.ZIP_DEFLATED)
    begin = 30 + len(f"{name}.npy")
    local = small[:18] + struct.pack("<I", len(stream)) + small[22:begin]
    central = patched(small, 20, struct.pack("<I", len(stream)))[small.index(b"PK\x01\x02") :]
    central = central[:-6] + struct.pack("<I", len(local + stream)) + central[-2:]
    yield "a stream longer than it says", local + stream + central
    yield "twice", good[:-22] and packed([(f"{name}.npy", npy(arrays[name]))] * 2)
    yield "many members", packed([(f"m{i}.npy", b"") for i in range(300)])
    yield "other names", packed([(f"../{n}.npy", npy(a)) for n, a in arrays.items()])
    yield "another npz inside", packed([("a.npz", good)])
    yield "one array", npy(arrays[name])
    yield "nothing", b""
    yield "text", b"rewards = 1\n" * 10
    yield "an end without a beginning", b"PK\x05\x06" + bytes(18)


def mutated(arrays, name, draw):
    """Bytes of a good file cut off, turned over or moved."""
    good = with_member(arrays, name, npy(arrays[name]), zipfile.ZIP_DEFLATED)
    for _ in range(60):
        data = bytearray(good)
        for _ in range(int(draw.integers(1, 6))):
            data[int(draw.integers(len(data)))] = int(draw.integers(256))
        yield "bytes changed", bytes(data)
    for cut in draw.integers(1, len(good), 30):
        yield "cut off", good[: int(cut)]
    for _ in range(30):
        a, b = sorted(map(int, draw.integers(0, len(good), 2)))
        yield "a piece missing", good[:a] + good[b:]


@pytest.mark.filterwarnings("ignore::UserWarning")  # zipfile's, of a name that it writes twice
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_broken_is_refused_in_one_line(kind, tmp_path):
    arrays, name, load = KINDS[kind]
    np.savez(tmp_path / "good.npz", **arrays)
    load(tmp_path / "good.npz")
    must = list(broken(arrays, name))
    may = list(mutated(arrays, name, np.random.default_rng(0)))
    assert len(must) + len(may) > 180
    path, began, survived = tmp_path / "file.npz", time.perf_counter(), 0
    tracemalloc.start()
    for i, (what, data) in enumerate(must + may):
        path.write_bytes(data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            load(path)
        except UserError as e:
            text = str(e)
            assert "\n" not in text, what
            assert len(text) < 600 + len(str(path)), what
            assert str(path) in text, what
        else:
            survived += 1
            assert i >= len(must), f"{what} was read"
        most = 120 << 20 if what == "bomb" else 8 << 20  # what its header says is read, before shapes are compared
        assert tracemalloc.get_traced_memory()[1] - before < most, what
    tracemalloc.stop()
    assert survived < len(may) / 2
    assert time.perf_counter() - began < 60


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    for path, message in ((tmp_path / "pipe.npz", "pipe or device"), (tmp_path, "folder"), ("/dev/zero", "device")):
        for load in (logged_data.load, tables.load):
            with pytest.raises(UserError, match=message):
                load(path)


ARRAYS = [np.arange(6, dtype=">i4"), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.ones(()), np.zeros((0, 3)),
          np.arange(4, dtype=np.float16), np.ones((2, 3), bool)]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_wrote(array, save, tmp_path):
    save(tmp_path / "a.npz", a=array, b=np.arange(3))
    found, others = npz.read(tmp_path / "a.npz", ["a"])
    assert found["a"].dtype == array.dtype
    assert np.array_equal(found["a"], array)
    assert others == ["b"]


def test_more_numbers_than_are_taken_are_refused_before_they_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(60), b=np.zeros(60))
    assert npz.read(tmp_path / "a.npz", ["a", "b"], numbers=120)[1] == []
    with pytest.raises(UserError, match=r"b is 60, too many numbers: 59 are left"):
        npz.read(tmp_path / "a.npz", ["a", "b"], numbers=119)
