"""Bytes of a model's weights in the formats of inference (finetune/inference/packed.py), as the CPU's kernels read
them: N is a multiple of 16 and K of 64, filled up with zeros.

    fp32 4 · N·K    bf16 2 · N·K    int8 N·K + 4·N    int4 N·K/2 + 2 · 2·N·K/32    nf4 N·K/2 + 4·N·K/64
"""

from __future__ import annotations

from finetune.memory.counts import block_vectors
from finetune.memory.setup import Shape

PANEL, DEPTH = 16, 64
CODE_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "nf4": 4}


def matrix_bytes(rows: int, depth: int, format: str) -> int:
    """Bytes of a packed matrix (rows, depth), codes and scales."""
    n, k = -(-rows // PANEL) * PANEL, -(-depth // DEPTH) * DEPTH
    groups = {"int8": 1, "int4": k // 32, "nf4": k // 64}
    return n * k * CODE_BITS[format] // 8 + 4 * n * groups.get(format, 0)


def packed_bytes(shape: Shape, format: str, head: str = "", element: int = 2) -> int:
    """Bytes of all weights of a packed model: its matrices in `format`, embedding and output projection in `head` ("":
    int8 with few bits, else the same; one table if they are tied), norms, biases and positions of `element` bytes."""
    head = head or (format if format in ("fp32", "bf16") else "int8")
    blocks = shape.layers * sum(matrix_bytes(out, into, format) for into, out in shape.linears.values())
    tables = shape.tables * matrix_bytes(shape.vocab, shape.dim, head)
    vectors = shape.layers * block_vectors(shape) + (2 if shape.family == "gpt" else 1) * shape.dim
    vectors += shape.max_length * shape.dim if shape.family == "gpt" else 0
    return blocks + tables + element * vectors
