"""What a DiT costs, by formula: parameters, FLOPs of an image, bytes of a training step."""

from __future__ import annotations

from .model import FREQUENCIES, DiTConfig


def linears(c: DiTConfig) -> list[tuple[int, int, int]]:
    """(inputs, outputs, rows an image) of every linear layer."""
    dim, pixels = c.dim, c.patch**2
    block = [(dim, 6 * dim, 1), (dim, 3 * dim, c.tokens), (dim, dim, c.tokens), (dim, 4 * dim, c.tokens),
             (4 * dim, dim, c.tokens)]  # fmt: skip
    ends = [(pixels * c.channels, dim, c.tokens), (FREQUENCIES, dim, 1), (dim, dim, 1), (dim, 2 * dim, 1),
            (dim, pixels * c.outputs, c.tokens)]  # fmt: skip
    return block * c.layers + ends


def parameters(c: DiTConfig) -> int:
    return sum((inputs + 1) * outputs for inputs, outputs, _ in linears(c)) + (c.classes + 1) * c.dim


def forward_flops(c: DiTConfig) -> int:
    """FLOPs of the forward pass of one image: two for each multiplication of a linear layer, and of the two products of
    attention, 4 N² C a layer. The paper counts a multiplication and its addition as one."""
    return sum(2 * i * o * rows for i, o, rows in linears(c)) + 4 * c.tokens**2 * c.dim * c.layers


def activation_bytes(c: DiTConfig, batch: int, element: int = 4, checkpointing: bool = False) -> int:
    """Bytes that the forward pass keeps for the backward pass; `element`: of a number, 4 or 2.

    A block keeps of a token 18 C numbers: x; the input of qkv; q, k, v; attention's output; o's output; x after the
    first half; the MLP's input, 4 C before and 4 C after the non-linearity, and its output. Statistics of the norms and
    of attention are 16 + 8 H bytes, and 6 C numbers are the condition of an image. Checkpointing keeps x alone.
    """
    token, image = (c.dim * element, 0) if checkpointing else (18 * c.dim * element + 16 + 8 * c.heads, 6 * c.dim)
    pixels = c.patch**2 * c.channels
    ends = (2 * c.dim + pixels) * element + 8  # the last norm's input and statistics, the head's input, the patches
    condition = (FREQUENCIES + 6 * c.dim) * element + 8  # of time and label, and the last norm's; the label itself
    return batch * (c.layers * (c.tokens * token + image * element) + c.tokens * ends + condition)


def memory(c: DiTConfig, batch: int, dtype: str = "fp32", checkpointing: bool = False) -> dict[str, int]:
    """Bytes of a training step by name. AdamW keeps two moments and, of bf16 weights, a master copy, all in fp32; so
    does the EMA."""
    element, count = {"fp32": 4, "bf16": 2}[dtype], parameters(c)
    positions = c.tokens * c.dim
    return {
        "weights": (count + positions) * element,
        "gradients": count * element,
        "optimizer states": count * (8 if element == 4 else 12),
        "EMA": 4 * count,
        "activations": activation_bytes(c, batch, element, checkpointing),
    }
