"""One training step of a DiT, ours and the same network in plain torch, on the same batches and threads:

    python -m finetune bench dit_vs_torch [--model S] [--batch 32] [--side 28] [--patch 4] [--steps 20] [--json FILE]

The other side is what the paper's code runs: torch's layers, LayerNorm without weights and a modulation in three
operations, F.scaled_dot_product_attention, F.gelu, AdamW that is not fused and clip_grad_norm_; in bf16 under autocast
with fp32 weights, as such code is trained. Ours has bf16 weights and fp32 masters. Steps alternate in one process; the
ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Times
from torch import Tensor, nn

from finetune import ops, optim
from finetune.runs import machine, registry

SAME = 3  # first steps, whose losses must agree
CLOSE = {"f32": 1e-3, "bf16": 2e-2}
model, cost = (registry.part("dit", name) for name in ("model", "cost"))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.condition, self.qkv, self.o = nn.Linear(dim, 6 * dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        rows, tokens, dim = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.condition(F.silu(condition)).chunk(6, 1)
        qkv = self.qkv(modulated(x, shift_a, scale_a)).reshape(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(rows, tokens, dim)
        x = x + gate_a.unsqueeze(1) * self.o(o)
        hidden = F.gelu(self.up(modulated(x, shift_m, scale_m)), approximate="tanh")
        return x + gate_m.unsqueeze(1) * self.down(hidden)


class PlainDiT(nn.Module):
    """Takes over the weights of the module's DiT."""

    def __init__(self, ours) -> None:
        super().__init__()
        c = self.config = ours.config
        self.embed = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)
        self.time = nn.Sequential(nn.Linear(256, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.labels = nn.Embedding(c.classes + 1, c.dim)
        self.blocks = nn.ModuleList(PlainBlock(c.dim, c.heads) for _ in range(c.layers))
        self.condition, self.head = nn.Linear(c.dim, 2 * c.dim), nn.Linear(c.dim, c.patch**2 * c.outputs)
        state = {n: p.detach().float() for n, p in ours.named_parameters()}
        state["embed.weight"] = state["embed.weight"].reshape(self.embed.weight.shape)
        self.load_state_dict(state)
        self.positions = ours.positions.float()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        c = self.config
        condition = self.time(model.frequencies_of(t, c.frequency_shift)) + self.labels(labels)
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.condition(F.silu(condition)).chunk(2, 1)
        n, p = c.side // c.patch, c.patch
        patches = self.head(modulated(tokens, shift, scale)).reshape(-1, n, n, p, p, c.outputs)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(-1, c.outputs, c.side, c.side)


def awake(net: nn.Module) -> None:
    """Small random weights where a DiT begins with zeros: a step must do a step's work, and its losses must differ."""
    g = torch.Generator().manual_seed(1)
    for p in net.parameters():
        if not p.any():
            p.data.normal_(0, 0.02, generator=g)


def stepper(net: nn.Module, optimizer, clip: Callable, autocast: bool) -> Callable[..., float]:
    def step(x: Tensor, t: Tensor, labels: Tensor, target: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = net(x, t, labels)
        loss = F.mse_loss(out.float(), target)
        loss.backward()
        clip([p.grad for p in net.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def clip_by_torch(gradients: list[Tensor]) -> None:
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (1.0 / (norm + 1e-6)).clamp(max=1.0))


def measure(wanted: argparse.Namespace, dtype: str, threads: int) -> dict:
    """Times of both sides, and the ratio torch / ours of each pair."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layers, dim, heads = model.SIZES[wanted.model]
    config = model.DiTConfig(wanted.side, 1, wanted.patch, dim, layers, heads, 10)
    ours = model.DiT(config)
    awake(ours)
    if dtype == "bf16":
        ours = ours.bfloat16()
    theirs = PlainDiT(ours)
    mine = optim.AdamW(ours.parameters(), lr=1e-4, weight_decay=0.0)
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.0)
    sides = {
        "ours": stepper(ours, mine, lambda g: ops.clip_grad_norm_(g, 1.0), False),
        "torch": stepper(theirs, other, clip_by_torch, dtype == "bf16"),
    }
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    furthest = 0.0
    for step in range(wanted.steps):
        x = torch.randn(wanted.batch, 1, wanted.side, wanted.side)
        t, labels = torch.randint(1000, (wanted.batch,)), torch.randint(11, (wanted.batch,))
        target = torch.randn(wanted.batch, config.outputs, wanted.side, wanted.side)
        losses = {}
        for name in list(sides) if step % 2 else list(sides)[::-1]:
            began = time.perf_counter()
            losses[name] = sides[name](x, t, labels, target)
            times[name].append(time.perf_counter() - began)
        if step < SAME:
            furthest = max(furthest, abs(losses["ours"] / losses["torch"] - 1))
    warm = max(1, wanted.steps // 6)
    pairs = list(zip(times["ours"][warm:], times["torch"][warm:], strict=True))
    seconds = statistics.median(a for a, _ in pairs)
    return {
        "dtype": dtype,
        "threads": threads,
        "images_per_second": wanted.batch / seconds,
        "flops_per_second": 3 * cost.forward_flops(config) * wanted.batch / seconds,
        "ours": dataclasses.asdict(Times.of([a for a, _ in pairs])),
        "torch": dataclasses.asdict(Times.of([b for _, b in pairs])),
        "ratio": dataclasses.asdict(Times.of([b / a for a, b in pairs])),
        "loss_difference": furthest,
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m finetune bench dit_vs_torch", description=__doc__.split("\n")[0])
    p.add_argument("--model", choices=list(model.SIZES), default="XS", help="size of the network (XS)")
    p.add_argument("--batch", type=int, default=32, help="images of a step (32)")
    p.add_argument("--side", type=int, default=28, help="pixels of a side (28)")
    p.add_argument("--patch", type=int, default=4, help="side of a patch (4)")
    p.add_argument("--dtype", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"], help="both")
    p.add_argument("--threads", nargs="+", type=int, default=[1, machine.physical_cores()], help="thread counts")
    p.add_argument("--steps", type=int, default=20, help="steps of each side (20)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    wanted = p.parse_args(argv)
    found = [measure(wanted, dtype, threads) for dtype in wanted.dtype for threads in dict.fromkeys(wanted.threads)]
    for r in found:
        ratio = r["ratio"]
        print(
            f"{r['dtype']}, {r['threads']} threads: {r['images_per_second']:,.0f} images/s, "
            f"{r['flops_per_second'] / 1e9:,.0f} GFLOP/s, torch / ours {ratio['median']:.2f}× "
            f"({ratio['p20']:.2f} … {ratio['p80']:.2f}), losses within {r['loss_difference']:.0e}"
        )
    if wanted.json:
        wanted.json.write_text(json.dumps({"machine": machine.describe(), "results": found}, indent=1) + "\n")
    return int(any(r["loss_difference"] > CLOSE[r["dtype"]] for r in found))


if __name__ == "__main__":
    sys.exit(main())
