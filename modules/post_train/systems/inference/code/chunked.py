"""Chunked prefill. A long prompt that is read in one step makes everybody else wait for that step. In chunks, a step is
bounded by a budget of tokens: those who decode take one each, the prompt gets the rest (Agrawal et al. 2023,
arXiv:2308.16369; 2024, arXiv:2403.02310).

    step ≈ c₀ + c₁ · tokens       longest gap of the others: c₀ + c₁ · budget
    time to the prompt's first token: ⌈prompt / (budget − others)⌉ steps, so it pays c₀ that many times
"""

from typing import Any

from finetune.inference.sampler import Sampling
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import plots
from .lab import Lab, seconds

OTHERS, PROMPT = 4, 1024  # sequences that decode; tokens of the prompt that arrives
BUDGETS = (32, 64, 128, 256, 512, PROMPT + 8)  # tokens of a step, at most
JUDGED = 128


def measure(lab: Lab) -> dict[str, Any]:
    """By budget: the seconds of three steps, and of each from the arrival of a long prompt to its first token. These
    are the gaps between two tokens of the others. Medians of three times."""
    runs = [[stalled(lab, budget) for budget in BUDGETS] for _ in range(3)]
    steps = [[plots.median(same) for same in zip(*times, strict=True)] for times in zip(*runs, strict=True)]
    return {"budget": list(BUDGETS), "steps": steps}


def stalled(lab: Lab, budget: int) -> list[float]:
    """The seconds of three steps, and of those in which the prompt is read."""
    steps = -(-PROMPT // (budget - OTHERS)) + 8
    engine = lab.engine(lab.served(), PROMPT + 1, OTHERS + 1, most_tokens=budget, prefix_cache=False)
    for i in range(OTHERS):
        engine.add(lab.reference[i * 16 :][:16], Sampling(), steps)
    while engine.scheduler.waiting or any(one.left != 1 for one in engine.scheduler.running):
        engine.step()
    before = [seconds(engine.step) for _ in range(3)]
    long = engine.add(lab.reference[:PROMPT], Sampling(), 1)
    during = []
    while not long.answer:
        during.append(seconds(engine.step))
    return before + during


def gaps(found: dict[str, Any]) -> dict[int, list[float]]:
    return {budget: steps[3:] for budget, steps in zip(found["budget"], found["steps"], strict=True)}


def judge(run: Run, found: dict[str, Any]) -> None:
    by_budget = gaps(found)
    chunks, whole = by_budget[JUDGED], by_budget[BUDGETS[-1]]
    run.result("chunked_longest_gap", max(chunks) / max(whole), baseline=1, target=0.5, higher=False)
    run.check("chunked_first_token", sum(chunks) / sum(whole))
    run.check("chunked_steps", len(chunks), at_least=(steps := -(-PROMPT // (JUDGED - OTHERS))), at_most=steps)


def picture(run: Run, found: dict[str, Any]) -> None:
    """chunked.png: every step by time, for three budgets; the trade by budget."""
    made, (left, right) = figure(12, 4.4, 1, 2)
    for budget, color in ((BUDGETS[-1], plots.RED), (256, plots.AMBER), (64, plots.BLUE)):
        steps = found["steps"][found["budget"].index(budget)]
        at = [0.0, *plots.running_sum(steps)]
        name = "whole prompt" if budget > PROMPT else f"budget {budget}"
        left.step(at, [1e3 * s for s in (steps[0], *steps)], color=color, label=name, linewidth=1.6)
    plots.logarithmic(left, "y")
    left.legend(frameon=False, fontsize=9)
    plots.titled(left, "gap between two tokens of the others", "seconds", "milliseconds")
    by_budget = gaps(found)
    x, y = [1e3 * max(steps) for steps in by_budget.values()], [sum(steps) for steps in by_budget.values()]
    right.plot(x, y, "o-", color=plots.BLUE)
    for budget, a, b in zip(by_budget, x, y, strict=True):
        right.annotate("whole" if budget > PROMPT else str(budget), (a, b), xytext=(4, 6), textcoords="offset points",
                       fontsize=9)  # fmt: skip
    plots.logarithmic(right, "x")
    right.set_ylim(0, None)
    plots.titled(right, "what a budget trades", "longest gap of the others, milliseconds",
                 "time to the prompt's first token, seconds")  # fmt: skip
    save(made, run.dir / "chunked.png")
