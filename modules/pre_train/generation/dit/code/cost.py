"""What a DiT costs, by formula: parameters, FLOPs of an image, bytes of a training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune import memory, optim
from finetune.diffusion.ema import Ema
from finetune.memory import meters
from finetune.memory.plan import Plan, states
from finetune.memory.setup import Term

from .model import FREQUENCIES, DiT, DiTConfig


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


BLOCK = {False: "N·(18·C·e + 16 + 8·H) + 6·C·e", True: "N·C·e"}  # what one keeps, as text; with checkpointing
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def terms(c: DiTConfig, batch: int, dtype: str = "fp32", checkpointing: bool = False) -> tuple[Term, ...]:
    """Bytes of a training step. AdamW keeps two moments and, of bf16 weights, a master copy, all in fp32; so does the
    EMA."""
    element = DTYPES[dtype].itemsize
    text = f"B·(L·({BLOCK[checkpointing]}) + N·((2·C + c)·e + 8) + (256 + 6·C)·e + 8)"
    kept = Term("activations", activation_bytes(c, batch, element, checkpointing), text, "what each op saves")
    return *states(parameters(c), c.tokens * c.dim, element), kept


def plan(c: DiTConfig, batch: int, dtype: str, checkpointing: bool) -> Plan:
    """For `python -m finetune memory dit`."""

    def measure() -> dict[str, int]:
        net = DiT(c).to(DTYPES[dtype])
        net.gradient_checkpointing = checkpointing
        weights = list(net.parameters())
        optimizer, ema = optim.AdamW(weights, lr=0.0), Ema(net, 0.9)
        x, labels = torch.zeros(batch, c.channels, c.side, c.side), torch.zeros(batch, dtype=torch.int64)
        net(x, labels, labels).sum().backward()
        optimizer.step()
        return step_bytes(net, optimizer, ema, x, labels)

    letters = {
        "P": (parameters(c), "parameters"), "b": (c.tokens * c.dim, "positions"), "B": (batch, "images"),
        "L": (c.layers, "layers"), "N": (c.tokens, "patches"), "C": (c.dim, "width"), "H": (c.heads, "heads"),
        "c": (c.patch**2 * c.channels, "numbers of a patch"), "e": (DTYPES[dtype].itemsize, "bytes a number"),
    }  # fmt: skip
    what = f"{c.layers} layers of width {c.dim}, {batch} × {c.channels}×{c.side}×{c.side} in {dtype}"
    what += ", checkpointed" if checkpointing else ""
    return Plan(what, parameters(c), terms(c, batch, dtype, checkpointing), measure, letters)


def step_bytes(net: DiT, optimizer: optim.AdamW, ema: Ema, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """The same bytes, and the step's growth of the process, as measured."""
    t = torch.zeros(len(x), dtype=torch.int64)
    measured = memory.measure(net, optimizer, lambda: net(x, t, labels).mean())
    return measured | {"EMA": meters.storage_bytes(ema.average.values())}
