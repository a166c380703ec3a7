"""Prefix cache on a shared system prompt. The keys and values of a full block depend on its tokens and on those before
it, so a hash of both names its content; a later prompt with the same beginning takes the block and computes only the
rest (vLLM's automatic prefix caching; RadixAttention, Zheng et al. 2024, keeps the same in a tree).

    hit rate = prompt tokens found in the cache / prompt tokens
"""

from typing import Any

from finetune.inference.sampler import Sampling
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import plots
from .lab import Lab, seconds

SYSTEM, QUESTION, REQUESTS = 640, 24, 24  # tokens that all prompts share; tokens of each one's own, at most; prompts


def measure(lab: Lab) -> dict[str, Any]:
    """Requests one after the other, with the cache and without: seconds to the first token, hits, tokens computed."""
    system = lab.reference[:SYSTEM]
    prompts = [system + question[:QUESTION] for question, _ in lab.pairs[:REQUESTS]]
    found: dict[str, Any] = {}
    for name, on in (("without", False), ("with", True)):
        engine = lab.engine(lab.served(), SYSTEM + QUESTION + 1, 4, prefix_cache=on, most_tokens=SYSTEM + QUESTION)
        first, answers = [], []
        for prompt in prompts:
            sequence = engine.add(prompt, Sampling(), 1)
            first.append(seconds(engine.run))
            answers.append(sequence.answer[0])
        hits, misses = engine.scheduler.hits, engine.scheduler.misses
        found[name] = {"first_s": first, "hits": hits, "misses": misses, "answers": answers}
    return found


def judge(run: Run, found: dict[str, Any]) -> None:
    without, cached = found["without"], found["with"]
    total = cached["hits"] + cached["misses"]
    run.result("prefix_hits", cached["hits"] / total, baseline=without["hits"] / total, target=0.9)
    later = slice(1, None)  # the first request finds nothing
    faster = plots.median(without["first_s"][later]) / plots.median(cached["first_s"][later])
    run.check("prefix_faster_first_token", faster, at_least=2)
    same = [a == b for a, b in zip(without["answers"], cached["answers"], strict=True)]
    run.check("prefix_same_tokens", sum(same) / len(same))


def picture(run: Run, found: dict[str, Any]) -> None:
    """prefix.png: time to the first token by request; prompt tokens computed."""
    made, (left, right) = figure(11.5, 4.2, 1, 2)
    for name, color in (("without", plots.RED), ("with", plots.BLUE)):
        times = [1e3 * s for s in found[name]["first_s"]]
        left.plot(range(1, len(times) + 1), times, "o-", color=color, label=f"{name} prefix cache", markersize=4)
        right.bar(f"{name} prefix cache", found[name]["misses"], color=color, width=0.5)
        right.text(
            f"{name} prefix cache", found[name]["misses"], f"{found[name]['misses']:,}", ha="center", va="bottom"
        )
    left.set_ylim(0, None)
    left.legend(frameon=False, fontsize=9)
    plots.titled(left, "time to the first token", "request", "milliseconds")
    plots.titled(right, "prompt tokens computed", "", "tokens")
    save(made, run.dir / "prefix.png")
