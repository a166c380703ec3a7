"""What a U-Net costs, by formula: bytes of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune import memory, optim
from finetune.diffusion.ema import Ema
from finetune.memory import meters
from finetune.memory.plan import Plan, states
from finetune.memory.setup import Term

from .unet import Attention, Block, UNet


@dataclass(frozen=True)
class Kept:
    """Numbers in fp32 that a part of the network keeps of an image for its backward pass."""

    what: str
    numbers: int


def kept(net: UNet, side: tuple[int, int]) -> Iterator[Kept]:
    """Part by part, of images of `side` (height, width).

    A block of c to d channels at P pixels keeps: x, and SiLU of its norm (2 c P); the first convolution's output, its
    norm, what goes into SiLU and into the second convolution (4 d P), with dropout its mask (d P); 1 + scale (d); mean
    and 1/std of each group of both norms. Its attention: x, the norm, q, k and v, and o (6 d P), and of each head and
    pixel a maximum and a sum. A block's output is the next part's x. What a level is halved from, and what it is
    doubled to, is a convolution's input; the skips are there already, and their concatenation is a block's x.
    """
    width, pixels = net.width, side[0] * side[1]
    yield Kept("time and label: waves, two layers, their SiLU", width + 4 * 4 * width)
    yield Kept("image", net.channels * pixels)
    for level, blocks in enumerate(net.down):
        yield from (Kept(f"down {level}", block_numbers(block, pixels)) for block in blocks_of(blocks))
        if level < len(net.shrink):
            yield Kept(f"halving {level}", cast(nn.Conv2d, net.shrink[level]).in_channels * pixels)
            pixels //= 4
    yield from (Kept("middle", block_numbers(block, pixels)) for block in blocks_of(net.middle))
    for level, blocks in enumerate(net.up):
        yield from (Kept(f"up {level}", block_numbers(block, pixels)) for block in blocks_of(blocks))
        if level < len(net.grow):
            pixels *= 4
            yield Kept(f"doubling {level}", cast(nn.Conv2d, net.grow[level]).in_channels * pixels)
    yield Kept("last norm and its SiLU", 2 * net.norm.num_channels * pixels + 2 * net.norm.num_groups)


def blocks_of(level: nn.Module) -> list[Block]:
    return cast(list[Block], list(cast(nn.ModuleList, level)))


def block_numbers(block: Block, pixels: int) -> int:
    ins, out = block.conv1.in_channels, block.conv1.out_channels
    numbers = (2 * ins + (4 + bool(block.drop.p)) * out) * pixels + out
    numbers += 2 * (block.norm1.num_groups + block.norm2.num_groups)
    if isinstance(block.attention, Attention):
        numbers += (6 * out + 2 * block.attention.heads) * pixels + 2 * block.attention.norm.num_groups
    return numbers


def activation_bytes(net: UNet, batch: int, side: tuple[int, int]) -> int:
    """Bytes that the forward pass of `batch` images keeps; the labels are 8 bytes each."""
    return batch * (4 * sum(part.numbers for part in kept(net, side)) + 8)


def plan(shape: dict[str, Any], batch: int, side: tuple[int, int]) -> Plan:
    """For `python -m finetune memory diffusion`; shape: the arguments of `UNet`, whose training is in fp32."""
    with torch.device("meta"):
        net = UNet(**shape)
    size = sum(p.numel() for p in net.parameters())

    def measure() -> dict[str, int]:
        real = UNet(**shape)
        optimizer, ema = optim.AdamW([*real.parameters()], lr=0.0), Ema(real, 0.9)
        x, labels = torch.zeros(batch, net.channels, *side), torch.zeros(batch, dtype=torch.int64)
        real(x, labels, labels).sum().backward()
        optimizer.step()
        return step_bytes(real, optimizer, ema, x, labels)

    parts = tuple(Term(part.what, 4 * part.numbers, f"4·{part.numbers:,}", "") for part in kept(net, side))
    saved = Term("activations", activation_bytes(net, batch, side), "B·(n + 8)", "what each op saves: below")
    what = f"{net.levels} levels from width {net.width}, {batch} × {net.channels}×{side[0]}×{side[1]} in fp32"
    letters = {"P": (size, "parameters"), "B": (batch, "images"), "n": (sum(t.bytes for t in parts), "bytes an image")}
    return Plan(what, size, (*states(size), saved), measure, letters, parts)


def step_bytes(net: UNet, optimizer: optim.AdamW, ema: Ema, x: Tensor, labels: Tensor) -> dict[str, int]:
    """The same bytes, and the step's growth of the process, as measured."""
    net.train()  # dropout keeps its masks
    t = torch.zeros(len(x), dtype=torch.int64)
    measured = memory.measure(net, optimizer, lambda: net(x, t, labels).mean())
    return measured | {"EMA": meters.storage_bytes(ema.average.values())}
