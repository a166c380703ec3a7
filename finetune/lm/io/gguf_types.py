"""The block formats of GGUF tensors, to and from fp32: bit for bit what gguf-py and ggml compute.

A tensor's rows are cut into blocks of 32 or 256 weights; a block holds its weights as small integers and one or more
scales. Layouts: ggml's `ggml-common.h` (block_q4_0, block_q4_K, …), sums in the order of `ggml-quants.c`. A decoder
maps blocks (N, bytes) uint8 to weights (N, weights) fp32, an encoder the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from finetune.errors import UserError

Array = np.ndarray
GROUP = 1 << 16  # blocks that are decoded at once: the intermediate arrays are several times as large as the weights
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)  # of IQ4


@dataclass(frozen=True)
class BlockType:
    """A block format: its size, and its two conversions. `encode` is None where files are only read."""

    weights: int
    nbytes: int
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array] | None = None

    @property
    def about(self) -> str:
        """One line about the format."""
        return (self.decode.__doc__ or "").split("\n")[0]


def halves(blocks: Array, at: int) -> Array:
    """The fp16 number at byte `at` of every block, as fp32 (N, 1)."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def nibbles(packed: Array) -> Array:
    """(N, 16) bytes → (N, 32): all the low halves first, then all the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def runs(packed: Array, run: int, bits: int) -> Array:
    """(N, bytes) → (N, bytes · 8 / bits) unsigned numbers of `bits` bits: every `run` bytes hold 8 / bits runs of that
    many numbers, the first run in the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    parts = packed.reshape(len(packed), -1, 1, run) >> shifts  # (N, bytes / run, 8 / bits, run)
    return (parts & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def fifth_bits(blocks: Array, at: int) -> Array:
    """Bit i of the little-endian 32-bit number at byte `at` → 16 or 0 for weight i; (N, 32) uint8."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def sixes(packed: Array) -> tuple[Array, Array]:
    """The eight 6-bit scales and eight 6-bit minima in the 12 bytes of a Q4_K or Q5_K block, each (N, 8) fp32.

    Bytes 0–3 hold scales 0–3 in their low six bits, bytes 4–7 minima 0–3. Scales 4–7 are the low nibbles of bytes 8–11
    under the top two bits of bytes 0–3; minima 4–7 the high nibbles of bytes 8–11 under the top two bits of bytes 4–7.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def spread(scales: Array, q: Array) -> Array:
    """Scales (N, S) times weights (N, W), each scale for W / S weights in a row: (N, S, W / S) fp32."""
    return scales[:, :, None] * q.reshape(len(q), scales.shape[1], -1).astype(np.float32)


def f32(blocks: Array) -> Array:
    """32-bit floats."""
    return blocks.copy().view(np.float32)


def f16(blocks: Array) -> Array:
    """16-bit floats."""
    return blocks.copy().view(np.float16).astype(np.float32)


def bf16(blocks: Array) -> Array:
    """bfloat16, the upper half of fp32."""
    return (blocks.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def q8_0(blocks: Array) -> Array:
    """8 bits, one scale for 32 weights.

    34 bytes: fp16 scale d, int8 q[32]; w = q · d.
    """
    return blocks[:, 2:].view(np.int8).astype(np.float32) * halves(blocks, 0)


def q4_0(blocks: Array) -> Array:
    """4 bits, one scale for 32 weights.

    18 bytes: fp16 scale d, nibbles q[32] (the low halves of the 16 bytes are weights 0–15); w = d · (q − 8).
    """
    return halves(blocks, 0) * (nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def q4_1(blocks: Array) -> Array:
    """4 bits, a scale and a minimum for 32 weights.

    20 bytes: fp16 scale d, fp16 minimum m, nibbles q[32]; w = d · q + m.
    """
    return halves(blocks, 0) * nibbles(blocks[:, 4:]).astype(np.float32) + halves(blocks, 2)


def q5_0(blocks: Array) -> Array:
    """5 bits, one scale for 32 weights.

    22 bytes: fp16 scale d, the fifth bits of all 32 weights in 4 bytes, nibbles q[32]; w = d · (q − 16).
    """
    q = nibbles(blocks[:, 6:]) | fifth_bits(blocks, 2)
    return halves(blocks, 0) * (q.astype(np.float32) - 16)


def q5_1(blocks: Array) -> Array:
    """5 bits, a scale and a minimum for 32 weights.

    24 bytes: fp16 scale d, fp16 minimum m, the fifth bits in 4 bytes, nibbles q[32]; w = d · q + m.
    """
    q = nibbles(blocks[:, 8:]) | fifth_bits(blocks, 4)
    return halves(blocks, 0) * q.astype(np.float32) + halves(blocks, 2)


def q2_k(blocks: Array) -> Array:
    """2 bits, 256 weights in sixteens with a 4-bit scale and minimum each.

    84 bytes: scales[16] (low nibble: scale s, high nibble: minimum m of sixteen weights), q[64] (every 32 bytes are
    four runs of 32 weights, two bits each), fp16 d, fp16 dmin; w = (d · s) · q − dmin · m.
    """
    packed = blocks[:, :16]
    scales = halves(blocks, 80) * (packed & 15).astype(np.float32)
    minima = halves(blocks, 82) * (packed >> 4).astype(np.float32)
    return (spread(scales, runs(blocks[:, 16:80], 32, 2)) - minima[:, :, None]).reshape(len(blocks), 256)


def q3_k(blocks: Array) -> Array:
    """3 bits, 256 weights in sixteens with a 6-bit scale each.

    110 bytes: high bits h[32] (bit r of byte i belongs to weight 32r + i), low two bits q[64] (as Q2_K's), 12 bytes of
    scales, fp16 d. The low nibbles of scale bytes 0–7 are the low four bits of scales 0–7, the high nibbles those of
    8–15; bytes 8–11 hold four runs of four scales' top two bits. w = (d · (s − 32)) · (q − 4 · (1 − h)).
    """
    packed = blocks[:, 96:108]
    scales = runs(packed[:, :8], 8, 4) | (runs(packed[:, 8:], 4, 2) << np.uint8(4))
    low, high = runs(blocks[:, 32:96], 32, 2), runs(blocks[:, :32], 32, 1)
    q = low.astype(np.int8) - ((high ^ 1) << 2).astype(np.int8)
    return spread(halves(blocks, 108) * (scales.astype(np.float32) - 32), q).reshape(len(blocks), 256)


def q4_k(blocks: Array) -> Array:
    """4 bits, 256 weights in thirty-twos with a 6-bit scale and minimum each.

    144 bytes: fp16 d, fp16 dmin, 12 bytes of scales and minima (`sixes`), q[128] (every 32 bytes are 32 weights in the
    low nibbles, then 32 in the high ones); w = (d · s) · q − dmin · m.
    """
    scales, minima = sixes(blocks[:, 4:16])
    weights = spread(halves(blocks, 0) * scales, runs(blocks[:, 16:], 32, 4))
    return (weights - (halves(blocks, 2) * minima)[:, :, None]).reshape(len(blocks), 256)


def q5_k(blocks: Array) -> Array:
    """5 bits, 256 weights in thirty-twos with a 6-bit scale and minimum each.

    176 bytes: as Q4_K, with the fifth bits h[32] (bit r of byte i belongs to weight 32r + i) before q[128].
    """
    scales, minima = sixes(blocks[:, 4:16])
    q = runs(blocks[:, 48:], 32, 4) | (runs(blocks[:, 16:48], 32, 1) << np.uint8(4))
    weights = spread(halves(blocks, 0) * scales, q)
    return (weights - (halves(blocks, 2) * minima)[:, :, None]).reshape(len(blocks), 256)


def q6_k(blocks: Array) -> Array:
    """6 bits, 256 weights in sixteens with an 8-bit scale each.

    210 bytes: low four bits ql[128] (every 64 bytes are 64 weights in the low nibbles, then 64 in the high ones), high
    two bits qh[64] (every 32 bytes are four runs of 32 weights), int8 scales s[16], fp16 d; w = (d · s) · (q − 32).
    """
    q = (runs(blocks[:, :128], 64, 4) | (runs(blocks[:, 128:192], 32, 2) << np.uint8(4))).astype(np.int8) - np.int8(32)
    scales = halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)  # (N, 16)
    return spread(scales, q).reshape(len(blocks), 256)


def iq4_nl(blocks: Array) -> Array:
    """4 bits that select one of 16 uneven levels, one scale for 32 weights.

    18 bytes: fp16 scale d, nibbles q[32]; w = d · LEVELS[q].
    """
    return halves(blocks, 0) * LEVELS[nibbles(blocks[:, 2:])]


def iq4_xs(blocks: Array) -> Array:
    """4 bits that select one of 16 uneven levels, 256 weights in thirty-twos with a 6-bit scale each.

    136 bytes: fp16 d, the top two bits of the eight scales in 2 bytes, their low nibbles in 4 (scale 0 in the low half
    of the first), q[128] (every 16 bytes are 32 weights, as IQ4_NL's); w = (d · (s − 32)) · LEVELS[q].
    """
    high = blocks[:, 2:4].copy().view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)  # (N, 8)
    scales = runs(blocks[:, 4:8], 1, 4) | ((high & 3).astype(np.uint8) << np.uint8(4))
    levels = LEVELS[runs(blocks[:, 8:], 16, 4)]
    return spread(halves(blocks, 0) * (scales.astype(np.float32) - 32), levels).reshape(len(blocks), 256)


# --- Encoders: plain rounding to the nearest, as ggml's reference functions do it


def to_f32(weights: Array) -> Array:
    return np.ascontiguousarray(weights, np.float32).view(np.uint8)


def to_f16(weights: Array) -> Array:
    return np.ascontiguousarray(weights.astype(np.float16)).view(np.uint8)


def to_bf16(weights: Array) -> Array:
    """Round to nearest, ties to even, on the bits (finite numbers)."""
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16).view(np.uint8)


def inverse(scales: Array) -> Array:
    """1 / d, and 0 for a scale of 0."""
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)


def fp16(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint8)


def packed_nibbles(q: Array) -> Array:
    """(N, 32) numbers below 16 → (N, 16) bytes: the inverse of `nibbles`."""
    return q[:, :16] | (q[:, 16:] << np.uint8(4))


def to_q8_0(weights: Array) -> Array:
    """d = max |w| / 127; q = w / d, rounded, halves away from zero."""
    d = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
    scaled = weights * inverse(d)
    size = np.abs(scaled)
    whole = np.floor(size)
    q = np.sign(scaled) * (whole + np.floor(2 * (size - whole)))
    return np.concatenate([fp16(d), q.astype(np.int8).view(np.uint8)], axis=1)


def to_q4_0(weights: Array) -> Array:
    """d = (the weight of largest size) / −8, so that this one becomes q = 0 exactly; q = w / d + 8, rounded."""
    largest = np.abs(weights).argmax(axis=1)[:, None]
    d = np.take_along_axis(weights, largest, axis=1) / np.float32(-8)
    q = np.trunc(weights * inverse(d) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([fp16(d), packed_nibbles(q)], axis=1)


def to_q4_1(weights: Array) -> Array:
    """m = min w, d = (max w − m) / 15; q = (w − m) / d, rounded."""
    low = weights.min(axis=1, keepdims=True)
    d = (weights.max(axis=1, keepdims=True) - low) / np.float32(15)
    q = np.trunc((weights - low) * inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([fp16(d), fp16(low), packed_nibbles(q)], axis=1)


# ggml's name of a type → the format. What is not listed cannot be read; what has an encoder can be written.
TYPES: dict[str, BlockType] = {
    "F32": BlockType(1, 4, f32, to_f32),
    "F16": BlockType(1, 2, f16, to_f16),
    "BF16": BlockType(1, 2, bf16, to_bf16),
    "Q8_0": BlockType(32, 34, q8_0, to_q8_0),
    "Q4_0": BlockType(32, 18, q4_0, to_q4_0),
    "Q4_1": BlockType(32, 20, q4_1, to_q4_1),
    "Q5_0": BlockType(32, 22, q5_0),
    "Q5_1": BlockType(32, 24, q5_1),
    "Q2_K": BlockType(256, 84, q2_k),
    "Q3_K": BlockType(256, 110, q3_k),
    "Q4_K": BlockType(256, 144, q4_k),
    "Q5_K": BlockType(256, 176, q5_k),
    "Q6_K": BlockType(256, 210, q6_k),
    "IQ4_NL": BlockType(32, 18, iq4_nl),
    "IQ4_XS": BlockType(256, 136, iq4_xs),
}


def dequantize(data: Array, kind: str) -> Array:
    """The weights, fp32, of `data` (…, bytes of a row) of a ggml type: (…, weights of a row).

    UserError if the type is not one of TYPES; ValueError if a row is not a whole number of blocks.
    """
    if kind not in TYPES:
        raise UserError(f"GGUF type {kind} is not supported: convert the file to one of {', '.join(TYPES)}")
    one = TYPES[kind]
    raw = np.ascontiguousarray(data).view(np.uint8)
    if raw.shape[-1] % one.nbytes:
        raise ValueError(f"a row of {raw.shape[-1]} bytes is not a whole number of {kind} blocks of {one.nbytes}")
    blocks = raw.reshape(-1, one.nbytes)
    weights = np.empty((len(blocks), one.weights), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite or no number: so are its weights then
        for start in range(0, len(blocks), GROUP):
            weights[start : start + GROUP] = one.decode(blocks[start : start + GROUP])
    return weights.reshape(*raw.shape[:-1], raw.shape[-1] // one.nbytes * one.weights)


def quantize(weights: Array, kind: str) -> Array:
    """The bytes (…, bytes of a row) of fp32 weights (…, weights of a row) as a ggml type.

    UserError if a weight is not finite or beyond the type's fp16 numbers; ValueError if the type is only read, or a row
    is not a whole number of blocks.
    """
    one = TYPES[kind]
    if one.encode is None or weights.shape[-1] % one.weights:
        raise ValueError(f"{kind} cannot be written, or a row of {weights.shape[-1]} is not made of its blocks")
    if not np.isfinite(weights).all():
        raise UserError("has weights that are infinite or not a number")
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, one.weights)
    coded = np.empty((len(blocks), one.nbytes), np.uint8)
    group = max(GROUP, (1 << 20) // one.weights)
    with np.errstate(all="ignore"):  # a block of subnormal weights overflows 1 / d: its fp16 scale is 0 all the same
        for start in range(0, len(blocks), group):
            coded[start : start + group] = one.encode(blocks[start : start + group])
    numbers = coded if kind == "F16" else coded[:, : {"Q8_0": 2, "Q4_0": 2, "Q4_1": 4}.get(kind, 0)]
    if not np.isfinite(np.ascontiguousarray(numbers).view(np.float16)).all():
        raise UserError(f"has weights up to {np.abs(weights).max():.3g}, too large for the fp16 numbers of {kind}")
    return coded.reshape(*weights.shape[:-1], weights.shape[-1] // one.weights * one.nbytes)
