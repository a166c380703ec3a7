"""Blocks against contiguous reservation. A contiguous cache reserves the longest answer for everybody, since nobody
knows where an answer ends; blocks are taken one at a time as it grows, so that a sequence wastes less than one (Kwon et
al. 2023, §3.1, §4).

    wasted = 1 − tokens stored / tokens reserved        of n tokens in blocks of b: ⌈n/b⌉·b − n, on average (b − 1)/2

The engine's own scheduler and pool run here without a model: the lengths of real questions and answers say when a
sequence ends. A contiguous reservation is the same pool with blocks as long as the longest sequence.
"""

from statistics import fmean
from typing import Any

from finetune.inference.blocks import BlockPool
from finetune.inference.sampler import Sampling
from finetune.inference.scheduler import Scheduler, Sequence
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import plots
from .lab import BLOCK, Lab

SIZES = (1, 4, 16, 64, 256, 1024)  # of blocks; the last is replaced by the longest sequence
ROOM = 8  # sequences of the longest kind that the memory holds


def serve(lengths: list[tuple[int, int]], room: int, block: int) -> dict[str, float]:
    """Serves (prompt, answer) lengths with `room` tokens of cache. Means over the steps of: tokens stored, tokens
    reserved, sequences at work; and the number of steps."""
    pool = BlockPool(room // block, block, prefix_cache=False)
    scheduler = Scheduler(pool, most_tokens=512, most_sequences=10_000)
    for prompt, answer in lengths:
        scheduler.add(Sequence([0] * prompt, Sampling(), answer))
    stored, reserved, running = [], [], []
    while scheduler.waiting or scheduler.running:
        for work in scheduler.plan():
            if work.sequence.left <= 0:  # here the engine has the model choose a token
                work.sequence.answer.append(0)
        stored.append(sum(one.table.tokens for one in scheduler.running))
        reserved.append(pool.used * block)
        running.append(len(scheduler.running))
        for one in [one for one in scheduler.running if len(one.answer) >= one.most_new]:
            scheduler.remove(one)
    full = [i for i, count in enumerate(running) if count >= max(running) / 2]  # not the end, when few are left
    means = (fmean(values[i] for i in full) for values in (stored, reserved, running))
    names = ("stored", "reserved", "running")
    return dict(zip(names, means, strict=True)) | {"steps": len(running), "preempted": scheduler.preemptions}


def measure(lab: Lab) -> dict[str, Any]:
    lengths = [(len(question), len(answer)) for question, answer in lab.pairs]
    longest = max(map(sum, lengths))
    sizes = [*(size for size in SIZES if size < longest), longest]
    served = [serve(lengths, ROOM * longest, size) for size in sizes]
    return {"block": sizes, "served": served, "lengths": [sum(pair) for pair in lengths]}


def wasted(part: dict[str, float]) -> float:
    return 1 - part["stored"] / part["reserved"]


def judge(run: Run, found: dict[str, Any]) -> None:
    by_block = dict(zip(found["block"], found["served"], strict=True))
    paged, contiguous = by_block[BLOCK], found["served"][-1]
    run.result("kv_wasted", wasted(paged), baseline=wasted(contiguous), target=wasted(contiguous) / 2, higher=False)
    # Of n tokens that grow one by one, all n mod b are equally likely: (b − 1)/2 slots a sequence are empty.
    expected = (BLOCK - 1) / 2 * paged["running"] / paged["reserved"]
    run.check("kv_wasted_over_formula", wasted(paged) / expected, at_least=0.75, at_most=1.25)
    run.check("kv_sequences_at_once", paged["running"] / contiguous["running"], at_least=2)
    run.check("kv_steps_saved", contiguous["steps"] / paged["steps"])


def picture(run: Run, found: dict[str, Any]) -> None:
    """blocks.png: the lengths; the waste, and how many sequences the same memory serves, by size of the blocks."""
    made, (first, second, third) = figure(14, 4.2, 1, 3)
    first.hist(found["lengths"], bins=40, color=plots.BLUE)
    first.axvline(max(found["lengths"]), color=plots.RED, linestyle="--", label="reserved for each")
    first.legend(frameon=False, fontsize=9)
    plots.titled(first, "questions with their answers", "tokens", "how many")
    share = [100 * wasted(part) for part in found["served"]]
    running = [part["running"] for part in found["served"]]
    formula = [50 * (b - 1) * part["running"] / part["reserved"] for b, part in zip(found["block"], found["served"],
                                                                                   strict=True)]  # fmt: skip
    second.plot(found["block"], share, "o-", color=plots.RED, label="measured")
    second.plot(found["block"][:-1], formula[:-1], "--", color=plots.GREY, label="(b − 1)/2 a sequence")
    second.legend(frameon=False, fontsize=9)
    plots.titled(second, "reserved and not used", "tokens of a block", "% of the reserved memory")
    third.plot(found["block"], running, "o-", color=plots.BLUE)
    plots.titled(third, "sequences at once in the same memory", "tokens of a block", "sequences")
    for axes in (second, third):
        axes.set_xscale("log", base=2)
        axes.set_xticks(found["block"], [*map(str, found["block"][:-1]), f"{found['block'][-1]}\nwhole"], fontsize=8)
        axes.set_ylim(0, None)
    save(made, run.dir / "blocks.png")
