"""One training step of nanogpt's default setting, ours and nanoGPT's own, on the same rows and threads:

    python -m finetune bench nanogpt_vs_torch [--threads 1 2] [--steps 60] [--json FILE]

The other side is what nanoGPT's train.py runs on a CPU: torch's own layers, F.scaled_dot_product_attention, the exact
GELU (its losses differ by that in the fourth digit), F.cross_entropy on all logits, AdamW that is not fused, and
clip_grad_norm_. Steps alternate in one process; the ratio is the median of the pairs' ratios. `best` is the ratio if
only the matrix products took time: both sides need the same ones, at the rate that each has here.
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
from torch import nn

from finetune import ops, optim
from finetune.runs import machine, registry

SAME = 5  # first steps, whose losses must agree; later the runs may part, as two runs of different rounding do


class PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.o = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, steps, dim = x.shape
        q, k, v = (
            self.qkv(self.attn_norm(x)).view(rows, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(rows, steps, dim))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class PlainGPT(nn.Module):
    """Takes over the weights of finetune.gpt.GPT."""

    def __init__(self, model) -> None:
        super().__init__()
        c = model.config
        self.embed, self.positions = nn.Embedding(c.vocab_size, c.dim), nn.Embedding(c.max_length, c.dim)
        self.blocks = nn.ModuleList(PlainBlock(c.dim, c.heads) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.dim)
        self.load_state_dict({n.replace("attn.", "").replace("mlp.", ""): p for n, p in model.state_dict().items()})

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        tokens, targets = rows[:, :-1], rows[:, 1:]
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def products(cfg, vocab: int) -> Callable[[], None]:
    """A step's matrix products and nothing else: forward, and backward by the input and by the weight."""
    tokens, dim = cfg.batch * cfg.length, cfg.dim
    layer = [(dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)]
    shapes = [*layer * cfg.layers, (dim, vocab)]
    operands = [(torch.randn(tokens, a), torch.randn(b, a), torch.randn(tokens, b)) for a, b in shapes]

    def call() -> None:
        for x, weight, y in operands:
            _ = x @ weight.t(), y @ weight, y.t() @ x

    return call


def measure(threads: int, steps: int) -> dict:
    """Times of both sides, and the ratio torch / ours of each pair."""
    module = registry.load(registry.find("nanogpt"))
    cfg = dataclasses.replace(module.Config(), steps=steps)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    text = "".join(module.open_text(cfg.data).pieces())
    tokenizer = module.make_tokenizer(cfg.tokenizer, cfg.vocab, [text])
    tokens = torch.tensor(tokenizer.encode(text))
    ours = module.GPT(module.model_config(cfg, tokenizer.vocab_size))
    theirs = PlainGPT(ours)
    decay = [[p for p in theirs.parameters() if p.dim() >= 2], [p for p in theirs.parameters() if p.dim() < 2]]
    groups = [{"params": decay[0], "weight_decay": cfg.weight_decay}, {"params": decay[1], "weight_decay": 0.0}]
    mine = optim.AdamW(optim.decay_groups(ours.parameters(), cfg.weight_decay), lr=cfg.lr, betas=(0.9, cfg.beta2))
    other = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2))

    def step_ours(rows: torch.Tensor) -> float:
        loss = module.language_loss(ours, rows)
        loss.backward()
        ops.clip_grad_norm_([p.grad for p in ours.parameters()], cfg.clip)
        mine.step()
        mine.zero_grad()
        return loss.item()

    def step_theirs(rows: torch.Tensor) -> float:
        loss = theirs.loss(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), cfg.clip)
        other.step()
        other.zero_grad()
        return loss.item()

    step_products = products(cfg, tokenizer.vocab_size)
    times: dict[str, list[float]] = {"ours": [], "torch": [], "products": []}
    furthest = 0.0
    for step in range(steps):
        starts = torch.randint(len(tokens) - cfg.length, (cfg.batch,))
        rows = tokens[starts[:, None] + torch.arange(cfg.length + 1)]
        losses = {}
        sides = [("ours", step_ours), ("torch", step_theirs)]
        for name, call in sides if step % 2 else sides[::-1]:
            began = time.perf_counter()
            losses[name] = call(rows)
            times[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        step_products()
        times["products"].append(time.perf_counter() - began)
        if step < SAME:
            furthest = max(furthest, abs(losses["ours"] / losses["torch"] - 1))
    warm = steps // 6
    pairs = list(zip(times["ours"][warm:], times["torch"][warm:], strict=True))
    floor = times["products"][warm:]
    return {
        "threads": threads,
        "tokens_per_second": cfg.batch * cfg.length / statistics.median(a for a, _ in pairs),
        "ours": dataclasses.asdict(Times.of([a for a, _ in pairs])),
        "torch": dataclasses.asdict(Times.of([b for _, b in pairs])),
        "ratio": dataclasses.asdict(Times.of([b / a for a, b in pairs])),
        "best": statistics.median(b / c for (_, b), c in zip(pairs, floor, strict=True)),
        "loss_difference": furthest,
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m finetune bench nanogpt_vs_torch", description=__doc__.split("\n")[0])
    p.add_argument("--threads", nargs="+", type=int, default=[1, machine.physical_cores()], help="thread counts")
    p.add_argument("--steps", type=int, default=60, help="steps of each side")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    wanted = p.parse_args(argv)
    found = [measure(threads, wanted.steps) for threads in dict.fromkeys(wanted.threads)]
    for r in found:
        ratio = r["ratio"]
        print(
            f"{r['threads']} threads: {r['tokens_per_second']:,.0f} tokens/s, torch / ours {ratio['median']:.2f}× "
            f"({ratio['p20']:.2f} … {ratio['p80']:.2f}; by the matrix products alone {r['best']:.2f}×), "
            f"losses within {r['loss_difference']:.0e}"
        )
    if wanted.json:
        wanted.json.write_text(json.dumps({"machine": machine.describe(), "results": found}, indent=1) + "\n")
    return int(any(r["loss_difference"] > 1e-3 for r in found))


if __name__ == "__main__":
    sys.exit(main())
