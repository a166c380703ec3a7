"""Executes compiled PTX (nvcc's text for sm_80, inline assembly included) in numpy: a second opinion on csrc/cuda that
shares nothing with the emulator, which runs the C++ source.

A launch runs its blocks a batch at a time; a register is an array over the batch's lanes. Each lane has a pc: the lanes
at the smallest one run next, up to the end of their basic block, and those at a barrier or a warp's collective wait for
the lanes it names. Address spaces are apart: shared memory is offsets from 0, its generic addresses carry a tag, and
an address of one space that is given to an instruction of another is a fault, as is one outside of what the launch may
touch, a misaligned one, or a barrier that not all reach. A fault names the PTX line and the source line. What is not
known here is an error, never skipped. Shared memory starts as NaN; asynchronous copies are made when they are waited
for, as late as the manual allows. Approximate instructions are computed exactly and rounded.

After the PTX ISA manual 9.0: https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SHARED_TAG = np.uint64(0x7E << 56)  # of generic addresses of shared memory; the low bits are the offset
TAG = np.uint64(0xFF << 56)
LANES = 2048  # about as many run at once
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT = {2: np.float16, 4: np.float32, 8: np.float64}


class Fault(Exception):
    pass


def dtype_of(word: str) -> np.dtype:
    """u32, b64, s16, f32, pred → numpy's type."""
    if word == "pred":
        return np.dtype(bool)
    kind, bits = word[0], int(word[1:])
    return np.dtype({"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOAT}[kind][bits // 8])


# --- the text


@dataclass
class Instruction:
    words: list[str]  # of the mnemonic
    operands: list[str]
    guard: str | None  # %p1, or !%p1
    line: int
    source: str  # file:line
    text: str


@dataclass
class Kernel:
    name: str
    module: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → (offset, bytes)
    registers: dict[str, np.dtype] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # name → offset
    shared_bytes: int = 0  # of static arrays
    dynamic: str | None = None  # the array that the launch sizes
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def allot(self, align: int, name: str, size: int) -> None:
        self.shared_bytes = -(-self.shared_bytes // align) * align
        self.shared[name] = self.shared_bytes
        self.shared_bytes += size


def split_operands(text: str) -> list[str]:
    """At the commas outside of brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


def parse(path: Path) -> dict[str, Kernel]:
    """The kernels of a PTX file by their mangled names."""
    lines = path.read_text().splitlines()
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', "\n".join(lines), re.MULTILINE))
    kernels: dict[str, Kernel] = {}
    common: list[tuple[int, str, int]] = []  # shared arrays of the file
    kernel, source, statement, begin, depth, header = None, "", "", 0, 0, ""
    scopes: list[dict[str, str]] = []
    callers: dict[str, str | None] = {}  # "file line column" → where it was inlined
    for number, line in enumerate(lines, 1):
        line = line.split("//")[0].strip()
        if line.startswith(".section"):
            break
        if found := re.match(r"\.loc\s+(\d+ \d+ \d+)(?:.*inlined_at (\d+ \d+ \d+))?", line):
            callers[found[1]] = found[2]
            source = " < ".join(chain(files, callers, found[1]))
            continue
        if found := re.match(r"(?:\.visible\s+)?\.entry\s+(\S+?)\(", line):
            kernel = Kernel(found[1], path.name)
            header, offset = "entry", 0
        if header:
            for align, kind, name, count in re.findall(
                r"\.param\s+(?:\.align (\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?", line
            ):
                size = int(kind[1:]) // 8 * int(count or 1)
                offset = -(-offset // int(align or size)) * int(align or size)
                kernel.parameters[name] = (offset, size)
                offset += size
            if line.startswith("{"):
                header = ""
                for each in common:
                    if any(each[1] in text for text in lines[number : next_end(lines, number)]):
                        kernel.allot(*each)
                scopes, depth = [{}], 1
            continue
        if kernel is None:
            if found := re.match(r"\.shared\s+\.align (\d+)\s+\.b8\s+(\w+)\[(\d+)\]", line):
                common.append((int(found[1]), found[2], int(found[3])))
            elif line and not re.match(r"\.(version|target|address_size|file|extern \.shared)\b", line):
                raise Fault(f"{path.name}:{number}: unknown: {line}")
            continue
        for piece in re.findall(r"[^;{}]+|[;{}]", line):
            if not statement.strip() and piece == "{":
                scopes.append({})
                depth += 1
            elif piece == "}" and "{" not in statement.replace("{}", "").rpartition("}")[2]:
                scopes.pop()
                depth -= 1
                if not depth:
                    kernels[kernel.name], kernel = kernel, None
                    break
            elif piece == ";":
                add(kernel, statement.strip(), begin, source, scopes)
                statement = ""
            elif found := re.match(r"\s*(\$\w+):\s*$", piece):
                kernel.labels[found[1]] = len(kernel.code)
            else:
                if not statement.strip():
                    begin = number
                statement += f" {piece}" if piece.strip() else ""
    dynamic = re.search(r"^\.extern \.shared .*?(\w+)\[\]", "\n".join(lines), re.MULTILINE)
    for each in kernels.values():
        each.dynamic = dynamic[1] if dynamic else None
    return kernels


def chain(files: dict[str, str], callers: dict[str, str | None], at: str | None) -> list[str]:
    """file:line of a place and of those that it was inlined at."""
    places: list[str] = []
    while at and len(places) < 8:
        number, line, _ = at.split()
        places.append(f"{Path(files[number]).name}:{line}")
        at = callers.get(at)
    return places


def next_end(lines: list[str], at: int) -> int:
    return next((i for i in range(at, len(lines)) if lines[i].startswith("}")), len(lines))


def add(kernel: Kernel, text: str, line: int, source: str, scopes: list[dict[str, str]]) -> None:
    """One statement inside of a kernel."""
    if found := re.match(r"\.reg \.(\w+)\s+(.+)", text):
        for name in found[2].split(","):
            name, _, count = name.strip().partition("<")
            names = [f"{name}{i}" for i in range(int(count[:-1]))] if count else [name]
            for each in names:
                if len(scopes) > 1:  # of an inline assembly's own: another one may use the name again
                    scopes[-1][each] = each = f"{each}@{line}"
                kernel.registers[each] = dtype_of(found[1])
    elif found := re.match(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
        kernel.allot(int(found[1]), found[2], int(found[3]))
    elif not text.startswith(".pragma"):
        kernel.code.append(instruction(kernel.module, text, line, source, scopes))


def instruction(module: str, text: str, line: int, source: str, scopes: list[dict[str, str]]) -> Instruction:
    if not (found := re.match(r"(?:@(!?%\w+)\s+)?([a-z][\w.]*(?:::\w+[\w.]*)*)\s*(.*)", text, re.DOTALL)):
        raise Fault(f"{module}:{line}: unknown: {text}")
    rest = found[3]
    for scope in scopes[1:]:
        for name, renamed in scope.items():
            rest = re.sub(rf"{re.escape(name)}\b", renamed, rest)
    return Instruction(found[2].split("."), split_operands(rest), found[1], line, source, text)


# --- arithmetic


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str) -> np.ndarray:
    """a · b + c, rounded once (rn, rz, rm, rp). The product of two float32 is exact in float64; the sum is rounded to
    odd there, so that the second rounding is the only one that counts."""
    if a.dtype == np.float64:
        return (a.astype(np.longdouble) * b + c).astype(np.float64)
    p, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = p + c
    back = total - p
    error = (p - (total - back)) + (c - back)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.uint64) & np.uint64(1) == 0)
    total = np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return rounded(total, mode)


def rounded(wide: np.ndarray, mode: str, to: type = np.float32) -> np.ndarray:
    near = wide.astype(to)
    if mode == "rn":
        return near
    back = near.astype(np.float64)
    up, down = np.nextafter(near, to(np.inf)), np.nextafter(near, to(-np.inf))
    if mode == "rz":
        return np.where(np.abs(back) > np.abs(wide), np.where(wide > 0, down, up), near)
    return np.where(back > wide, down, near) if mode == "rm" else np.where(back < wide, up, near)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), near).astype(np.uint16)


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def by_float64(function):
    """An approximate instruction: exact, then rounded; .ftz takes and gives no denormal numbers."""

    def call(words, *args):
        args = [flush(a) for a in args] if "ftz" in words else args
        y = function(*(a.astype(np.float64) for a in args)).astype(args[0].dtype)
        return flush(y) if "ftz" in words else y

    return call


def divide(words, a, b):
    if a.dtype.kind == "f":
        return by_float64(np.divide)(words, a, b) if "approx" in words or "full" in words else a / b
    if (b == 0).any():
        raise Fault("an integer is divided by 0")
    q = np.abs(a) // np.abs(b) if a.dtype.kind == "i" else a // b
    q = np.where((a < 0) != (b < 0), -q, q) if a.dtype.kind == "i" else q
    return (a - q * b if words[0] == "rem" else q).astype(a.dtype)


def shift(words, a, n):
    bits = a.dtype.itemsize * 8
    safe = np.minimum(n, bits - 1).astype(a.dtype)
    if words[0] == "shl":
        return np.where(n >= bits, a.dtype.type(0), a << safe)
    return a >> safe if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), a >> safe)


def multiply(words, a, b):
    if a.dtype.kind == "f":
        return rounded(a.astype(np.float64) * b, words[1]) if words[1] in ("rz", "rm", "rp") else a * b
    size = a.dtype.itemsize
    if words[1] == "lo":
        return a * b
    table = SIGNED if a.dtype.kind == "i" else UNSIGNED
    if words[1] == "wide":
        return a.astype(table[2 * size]) * b.astype(table[2 * size])
    if size == 8:
        return np.array([int(x) * int(y) >> 64 for x, y in np.broadcast(a, b)], dtype=object).astype(a.dtype)
    return (a.astype(table[8]) * b.astype(table[8]) >> table[8](8 * size)).astype(a.dtype)


def multiply_add(words, a, b, c):
    return multiply(words, a, b) + c


def bit_field(words, a, at, length):
    bits = a.dtype.itemsize * 8
    at, length = at & 0xFF, length & 0xFF
    if (length == 0).any() or (at + length > bits).any():
        raise Fault("bfe past the end of its word")
    up = (bits - length - at).astype(a.dtype)
    return (a << up) >> (bits - length).astype(a.dtype)


def insert_field(words, a, b, at, length):
    one = b.dtype.type(1)
    mask = np.where(length >= b.dtype.itemsize * 8, ~b.dtype.type(0), (one << length.astype(b.dtype)) - one)
    mask = mask << at.astype(b.dtype)
    return (b & ~mask) | ((a << at.astype(b.dtype)) & mask)


def permute_bytes(words, a, b, how):
    if words[1] != "b32":
        raise Fault("prmt with a mode")
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast(a, how).shape, np.uint32)
    for i in range(4):
        nibble = (how >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        byte = np.where(nibble & np.uint32(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def any_logic(words, a, b, c, table):
    out, table = np.zeros_like(a | b | c), int(np.ravel(table)[0])
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def funnel(words, low, high, n):
    n = (n & np.uint32(31) if "wrap" in words else np.minimum(n, 32)).astype(np.uint64)
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    moved = both >> n if words[1] == "r" else (both << n) >> np.uint64(32)
    return moved.astype(np.uint32)


def fused(words, a, b, c):
    return fma(a, b, c, words[1])


def of_pairs(words, *given):
    """fma and sub of two 16-bit floats a register."""
    out = np.uint32(0)
    for half in (0, 16):
        bits = [(x >> np.uint32(half)).astype(np.uint16) for x in given]
        if words[-1] == "bf16x2":
            values = [(x.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64) for x in bits]
        else:
            values = [x.view(np.float16).astype(np.float64) for x in bits]
        wide = values[0] * values[1] + values[2] if words[0] == "fma" else values[0] - values[1]
        if words[-1] == "bf16x2" and not np.array_equal(wide.astype(np.float32), wide, equal_nan=True):
            raise Fault("a result of bf16x2 that would be rounded twice: not supported")
        narrow = bf16_bits(wide) if words[-1] == "bf16x2" else wide.astype(np.float16).view(np.uint16)
        out = out | (narrow.astype(np.uint32) << np.uint32(half))
    return out


def extreme(words, a, b):
    if a.dtype.kind == "f" and "NaN" not in words:
        return (np.fmin if words[0] == "min" else np.fmax)(a, b)
    return (np.minimum if words[0] == "min" else np.maximum)(a, b)


def compare(words, a, b):
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else False
    name = words[1]
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    plain = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name[:2])
    how = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[plain]
    return (how & ~unordered) if a.dtype.kind == "f" and len(name) == 2 else how | unordered


PLAIN = {  # mnemonic → f(words, operands…), all operands of the type that the mnemonic ends in
    "add": lambda w, a, b: a + b,
    "sub": lambda w, a, b: a - b,
    "mul": multiply,
    "mad": multiply_add,
    "fma": fused,
    "div": divide,
    "rem": divide,
    "min": extreme,
    "max": extreme,
    "neg": lambda w, a: -a,
    "abs": lambda w, a: np.abs(a),
    "and": lambda w, a, b: a & b,
    "or": lambda w, a, b: a | b,
    "xor": lambda w, a, b: a ^ b,
    "not": lambda w, a: ~a,
    "shl": shift,
    "shr": shift,
    "shf": funnel,
    "bfe": bit_field,
    "bfi": insert_field,
    "prmt": permute_bytes,
    "lop3": any_logic,
    "popc": lambda w, a: np.array([int(x).bit_count() for x in a], np.uint32),
    "clz": lambda w, a: np.array([8 * a.itemsize - int(x).bit_length() for x in a], np.uint32),
    "ex2": by_float64(np.exp2),
    "lg2": by_float64(np.log2),
    "sin": by_float64(np.sin),
    "cos": by_float64(np.cos),
    "tanh": by_float64(np.tanh),
    "rsqrt": by_float64(lambda x: 1 / np.sqrt(x)),
    "rcp": by_float64(lambda x: 1 / x),
    "sqrt": by_float64(np.sqrt),
}


def convert(words: list[str], x: np.ndarray, to: str, how: str) -> np.ndarray:
    """cvt of one value, from the type of `x` (bf16 comes as bits)."""
    if how == "bf16":
        x = (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if to == "bf16":
        return bf16_bits(x)
    target = dtype_of(to)
    if x.dtype.kind != "f":
        if target.kind != "f":
            return x.astype(target)
        mode = next(w for w in words if w in ("rn", "rz", "rm", "rp"))
        return x.astype(target) if mode == "rn" else rounded(x.astype(np.float64), mode, target.type)
    if target.kind != "f":  # a NaN becomes 0, what is too large the end of the range
        mode = next(w for w in words if w in ("rni", "rzi", "rmi", "rpi"))
        whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(np.float64))
        ends = np.iinfo(target)
        inside = np.clip(np.nan_to_num(whole), float(ends.min), float(ends.max))
        out = inside.astype(target)
        return np.where(whole >= float(ends.max), target.type(ends.max), out)
    if mode := next((w for w in words if w in ("rni", "rzi", "rmi", "rpi")), None):
        x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)
    mode = next((w for w in words if w in ("rz", "rm", "rp")), "rn")
    y = x.astype(target) if target.itemsize >= x.dtype.itemsize else rounded(x.astype(np.float64), mode, target.type)
    return np.where(np.isnan(y), target.type(0), np.clip(y, 0, 1)).astype(target) if "sat" in words else y
