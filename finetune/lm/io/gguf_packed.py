"""GGUF's blocks as the codes and scales of ops.quantized_linear, without passing through floating-point weights.

    Q8_0   int8, a scale for 32                            Q4_0   int4 without minima
    Q6_K   int8, the product of both scales for 16         Q4_1   int4
                                                           Q4_K   int4, the products of both scales and of both minima
The products of K-quants are exact in fp32 (11 and at most 8 bits), so that the weights are those of gguf_types.py, bit
for bit. Rows are independent: they may be permuted before or after.
"""

from __future__ import annotations

import numpy as np
import torch

from finetune.lm.io.gguf_types import GROUP, TYPES, Array, halves, nibbles, runs, sixes
from finetune.ops.quantized_linear import QuantizedWeight
from finetune.ops.quantized_linear import halves as halves_of

Parts = tuple[Array, Array, Array | None]  # codes (N, weights), scales (N, groups), minima of blocks (N, bytes)


def q8_0(blocks: Array) -> Parts:
    return blocks[:, 2:].view(np.int8), halves(blocks, 0), None


def q4_0(blocks: Array) -> Parts:
    return nibbles(blocks[:, 2:]), halves(blocks, 0), None


def q4_1(blocks: Array) -> Parts:
    return nibbles(blocks[:, 4:]), halves(blocks, 0), halves(blocks, 2)


def q4_k(blocks: Array) -> Parts:
    scales, minima = sixes(blocks[:, 4:16])
    return runs(blocks[:, 16:], 32, 4), halves(blocks, 0) * scales, -(halves(blocks, 2) * minima)


def q6_k(blocks: Array) -> Parts:
    low, high = runs(blocks[:, :128], 64, 4), runs(blocks[:, 128:192], 32, 2)
    q = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    return q, halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


# Types whose blocks are served: format of the op, its group, the reader.
SERVED = {
    "Q8_0": ("int8", 32, q8_0),
    "Q6_K": ("int8", 16, q6_k),
    "Q4_0": ("int4", 32, q4_0),
    "Q4_1": ("int4", 32, q4_1),
    "Q4_K": ("int4", 32, q4_k),
}
PLAIN = {"F32": "fp32", "F16": "bf16", "BF16": "bf16"}  # types without blocks → format of the op


def packed(rows: Array, kind: str) -> QuantizedWeight:
    """rows (N, bytes of a row) uint8 of a type in SERVED → the weight (N, K)."""
    format, group, read = SERVED[kind]
    one = TYPES[kind]
    count, depth = len(rows), rows.shape[1] // one.nbytes * one.weights
    blocks = np.ascontiguousarray(rows).reshape(-1, one.nbytes)
    codes = np.empty((len(blocks), one.weights), np.uint8)
    scale = np.empty((len(blocks), one.weights // group), np.float32)
    minimum = np.empty_like(scale) if kind in ("Q4_1", "Q4_K") else None
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite or no number
        for at in range(0, len(blocks), GROUP):
            some = slice(at, at + GROUP)
            q, scale[some], low = read(blocks[some])
            codes[some] = q.view(np.uint8)
            if minimum is not None:
                minimum[some] = low
    whole = torch.from_numpy(codes).view(count, depth)
    numbers = [None if one is None else torch.from_numpy(one).view(count, -1) for one in (scale, minimum)]
    if all(one is None or torch.equal(one.half().float(), one) for one in numbers):
        numbers = [None if one is None else one.half() for one in numbers]
    made = halves_of(whole) if format == "int4" else whole.view(torch.int8)
    return QuantizedWeight(format, made, numbers[0], numbers[1], group, (count, depth))
