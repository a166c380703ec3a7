"""How much answers depend on their company: what invariance.py explains, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.inference.scheduler import Sequence as Request


@dataclass(frozen=True)
class Drift:
    """What `company` requests at once change in each other's answers. Tokens count up to the first that differs."""

    company: int
    answers: int  # that differ in a token
    tokens: int  # compared
    same_bits: float  # share of them whose log-probability is the same to the bit
    largest: float  # |difference of log-probabilities| (nats), of the same token


def drift(
    start: Callable[[], Engine], prompts: Sequence[Sequence[int]], most_new: int, companies: Sequence[int] = (2, 4, 8)
) -> list[Drift]:
    """Answers to `prompts` in groups of each size of `companies`, next to those that they get alone. `start` makes an
    engine, without a prefix cache that outlives it."""
    alone = [one for prompt in prompts for one in answered(start(), [prompt], most_new)]
    found = []
    for company in companies:
        groups = [prompts[i : i + company] for i in range(0, len(prompts), company)]
        together = [one for group in groups for one in answered(start(), group, most_new)]
        gaps = [gap for mine, theirs in zip(alone, together, strict=True) for gap in differences(mine, theirs)]
        changed = sum(mine.answer != theirs.answer for mine, theirs in zip(alone, together, strict=True))
        same = sum(gap == 0 for gap in gaps) / max(len(gaps), 1)
        found.append(Drift(company, changed, len(gaps), same, max(gaps, default=0.0)))
    return found


def answered(engine: Engine, prompts: Sequence[Sequence[int]], most_new: int) -> list[Request]:
    """Greedy answers with log-probabilities; all prompts begin in the first step."""
    found = [engine.add(prompt, Sampling(logprobs=0), most_new) for prompt in prompts]
    engine.run()
    return found


def differences(mine: Request, theirs: Request) -> list[float]:
    """|Δ log p| of each token, up to the first that differs."""
    found = []
    for a, b, p, q in zip(mine.answer, theirs.answer, mine.logprobs, theirs.logprobs, strict=False):
        if a != b:
            break
        found.append(abs(p.chosen - q.chosen))
    return found
