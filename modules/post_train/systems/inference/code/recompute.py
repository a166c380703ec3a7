"""Cache against recomputation. A token's keys and values depend on the tokens before it only, so they never change
once computed. With them in a cache, the next token costs one row of every product; without, a row for each token of
the text.

    products of the t-th token: 2·P·t FLOPs without a cache, 2·P with one        P: weights in matrices
    of an answer of n tokens:   Σ t = n(n + 1)/2 rows, against n
"""

from typing import Any

import torch

from finetune.inference.sampler import Sampling
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import plots
from .lab import Lab, seconds

LENGTHS, SAME = (16, 32, 64, 128, 256, 512), 16  # tokens before the timed one; tokens of the compared answers


def measure(lab: Lab) -> dict[str, Any]:
    """Milliseconds of the token after `lengths` others: read again as a whole, or with a cache."""
    model = lab.served()
    found: dict[str, Any] = {"length": list(LENGTHS), "again_ms": [], "cached_ms": []}
    for length in LENGTHS:
        again, cached = [], []
        turns = 1 + max(1, lab.cfg.rounds // 3)
        engine = lab.decoding(model, 1, length, turns + 1)
        for _ in range(turns):
            other = lab.engine(model, length + 1, 1, most_tokens=length, prefix_cache=False)
            other.add(lab.reference[:length], Sampling(), 1)
            again.append(seconds(other.step))
            cached.append(seconds(engine.step))
        found["again_ms"].append(plots.median(again[1:]) * 1e3)
        found["cached_ms"].append(plots.median(cached[1:]) * 1e3)
    found["same"] = same_tokens(lab)
    return found


def same_tokens(lab: Lab) -> float:
    """The share of an answer's tokens that recomputation gives too, in fp32."""
    prompt = lab.reference[:32]
    engine = lab.engine(lab.model, 32 + SAME, 1)
    cached = engine.add(prompt, Sampling(), SAME)
    engine.run()
    again: list[int] = []
    with torch.no_grad():
        for _ in range(SAME):
            again.append(int(lab.model(torch.tensor([prompt + again]))[0, -1].argmax()))
    return sum(a == b for a, b in zip(cached.answer, again, strict=True)) / SAME


def judge(run: Run, found: dict[str, Any]) -> None:
    run.check("cache_speedup", found["again_ms"][-1] / found["cached_ms"][-1], at_least=2)
    run.check("cache_same_tokens", found["same"], at_least=1)


def picture(run: Run, found: dict[str, Any]) -> None:
    """cache.png: time of the next token, and of an answer, by length."""
    made, (left, right) = figure(11.5, 4.4, 1, 2)
    for name, key, color in (("recomputed", "again_ms", plots.RED), ("with a cache", "cached_ms", plots.BLUE)):
        left.plot(found["length"], found[key], "o-", color=color, label=name)
        total = plots.integral(found["length"], found[key])
        right.plot(found["length"], [ms / 1e3 for ms in total], "o-", color=color, label=name)
    plots.titled(left, "the next token", "tokens before it", "milliseconds")
    plots.titled(right, "all tokens up to there", "tokens of the text", "seconds")
    for axes in (left, right):
        axes.set_ylim(0, None)
        axes.legend(frameon=False, fontsize=9)
    save(made, run.dir / "cache.png")
