"""Speculative decoding: γ cheap guesses, checked in one pass of the model, which reads its weights once for all of them
(Leviathan et al. 2023). If each guess is accepted with probability α, independently,

    tokens a pass:  E = (1 − α^(γ+1)) / (1 − α)
    speed:          E / (γ·c + v)        c: a guess, v: a pass that checks, both in passes of the model for one token

Guesses come from the text (the n-gram that followed last time: c ≈ 0) or from a draft model.
"""

from collections.abc import Sequence as Sequences
from typing import Any

from finetune.inference.sampler import Sampling
from finetune.inference.scheduler import Sequence
from finetune.inference.speculative import Drafter, DraftModel, PromptLookup
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import plots
from .lab import BLOCK, Lab, seconds

GUESSES, PROMPTS, PROMPT, ANSWER, JUDGED = (1, 2, 4, 8), 3, 64, 48, 4


class Counted:
    """A drafter whose passes with all γ guesses are counted, with what became of the guesses."""

    def __init__(self, drafter: Drafter, guesses: int) -> None:
        self.drafter, self.guesses = drafter, guesses
        self.passes = self.accepted = self.rejected = 0
        self.before = -1  # length of the answer at the last pass with all guesses

    def propose(self, sequences: Sequences[Sequence]) -> None:
        for one in sequences:
            self.settle(one)
        self.drafter.propose(sequences)
        for one in sequences:
            full = len(one.guesses) == self.guesses < one.most_new - len(one.answer)
            self.before = len(one.answer) if full else -1

    def settle(self, one: Sequence) -> None:
        """Counts the pass before this one: how far the answer has grown since."""
        if self.before >= 0:
            accepted = len(one.answer) - self.before - 1
            self.passes += 1
            self.accepted += accepted
            self.rejected += accepted < self.guesses
        self.before = -1

    def forget(self, sequence: Sequence) -> None:
        self.settle(sequence)
        self.drafter.forget(sequence)


def drafter(lab: Lab, kind: str, guesses: int) -> Counted:
    if kind == "n-grams":
        return Counted(PromptLookup(guesses), guesses)
    blocks = -(-(PROMPT + ANSWER + guesses) // BLOCK)
    return Counted(DraftModel(lab.draft, blocks, BLOCK, guesses), guesses)


def measure(lab: Lab) -> dict[str, Any]:
    """By drafter and number of guesses: α, tokens a pass, and the speed over decoding without guesses, side by side."""
    prompts = [lab.reference[i * 1000 :][:PROMPT] for i in range(PROMPTS)]
    found: dict[str, Any] = {"guesses": list(GUESSES), "n-grams": [], "draft model": []}
    for guesses in GUESSES:
        plain, answers = answer(lab, prompts, None)
        for kind in ("n-grams", "draft model"):
            counted = drafter(lab, kind, guesses)
            took, same = answer(lab, prompts, counted)
            checked = counted.accepted + counted.rejected
            found[kind].append({
                "alpha": counted.accepted / checked if checked else 0.0,
                "per_pass": 1 + counted.accepted / max(counted.passes, 1),
                "passes": counted.passes,
                "speed": plots.median([a / b for a, b in zip(plain, took, strict=True)]),
                "same": sum(a == b for a, b in zip(answers, same, strict=True)) / len(answers),
            })  # fmt: skip
    return found


def answer(lab: Lab, prompts: list[list[int]], drafter: Counted | None) -> tuple[list[float], list[list[int]]]:
    """Seconds of decoding, and the greedy answers, one prompt after the other."""
    times, answers = [], []
    for prompt in prompts:
        engine = lab.engine(lab.served(), PROMPT + ANSWER + 8, 1, drafter=drafter)
        sequence = engine.add(prompt, Sampling(), ANSWER)
        engine.step()  # the prompt
        times.append(seconds(engine.run))
        answers.append(sequence.answer)
    return times, answers


def expected(alpha: float, guesses: int) -> float:
    """Tokens a pass, equation 1 of Leviathan et al. 2023."""
    return guesses + 1 if alpha == 1 else (1 - alpha ** (guesses + 1)) / (1 - alpha)


def judge(run: Run, found: dict[str, Any]) -> None:
    at = found["guesses"].index(JUDGED)
    row = found["draft model"][at]
    run.result("speculation_tokens_per_pass", row["per_pass"], baseline=1, target=1.5 if run.toy else 2)
    run.check("speculation_over_formula", row["per_pass"] / expected(row["alpha"], JUDGED), at_least=0.8, at_most=1.2)
    run.check("speculation_alpha", row["alpha"])
    run.check("speculation_speed", max(r["speed"] for r in found["draft model"]))
    run.check("speculation_speed_ngrams", max(r["speed"] for r in found["n-grams"]))
    same = [r["same"] for kind in ("n-grams", "draft model") for r in found[kind]]
    run.check("speculation_same_answers", min(same))


def picture(run: Run, found: dict[str, Any]) -> None:
    """speculation.png: tokens a pass with the formula, and speed, by number of guesses."""
    made, (left, right) = figure(11.5, 4.4, 1, 2)
    for kind, color in (("n-grams", plots.AMBER), ("draft model", plots.BLUE)):
        rows, guesses = found[kind], found["guesses"]
        left.plot(guesses, [r["per_pass"] for r in rows], "o", color=color, label=f"{kind}, measured")
        formula = [expected(r["alpha"], g) for r, g in zip(rows, guesses, strict=True)]
        left.plot(guesses, formula, "--", color=color, label=f"{kind}, formula with its α", linewidth=1.2)
        right.plot(guesses, [r["speed"] for r in rows], "o-", color=color, label=kind)
    right.axhline(1, color=plots.GREY, linewidth=1.2, linestyle="--", label="no guesses")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(found["guesses"], [str(g) for g in found["guesses"]])
        axes.set_ylim(0, None)
        axes.legend(frameon=False, fontsize=9)
    plots.titled(left, "tokens a pass of the model", "guesses γ", "tokens")
    plots.titled(right, "speed over decoding without guesses", "guesses γ", "×")
    save(made, run.dir / "speculation.png")
