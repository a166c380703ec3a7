"""What a policy is worth: held-out pairs, and answers sampled before, during and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.alignment.logprobs import Reference
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer
from finetune.runs.run import Run

from . import data
from .batch import answer_logprobs
from .data import Answer, Pair
from .reference import MovingReference

if TYPE_CHECKING:
    from .main import Config

CLEAR = 2.5  # a gap of the reward at which a pair is clear


def evaluate(
    cfg: Config, pairs: Sequence[Pair], policy_logprobs: Sequence[Tensor], reference_logprobs: Sequence[Tensor]
) -> dict[str, float]:
    """Held-out pairs: how often the implicit reward prefers the chosen answer (of all, and of those with a clear gap),
    the margin, and the log-probabilities of the answers, from those of the tokens of chosen, rejected, chosen, …"""
    policy, reference = (
        torch.stack([x.sum() for x in values]).view(-1, 2).double() for values in (policy_logprobs, reference_logprobs)
    )
    h = policy - reference
    margins = h[:, 0] - h[:, 1]
    right = (margins.sign() + 1) / 2
    found = {
        "held_out_accuracy": right.mean().item(),
        "held_out_margin": cfg.beta * margins.mean().item(),
        "held_out_chosen_logprob": policy[:, 0].mean().item(),
        "held_out_rejected_logprob": policy[:, 1].mean().item(),
    }
    clear = torch.tensor([pair.gap is not None and pair.gap >= CLEAR for pair in pairs])
    return found | ({"clear_accuracy": right[clear].mean().item()} if clear.any() else {})


@dataclass(frozen=True)
class Taste:
    """Answers sampled from the policy, their rewards (none without a reward), and log π − log π_ref of each."""

    answers: list[Answer]
    rewards: list[float]
    kls: list[float]

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]

    @property
    def means(self) -> dict[str, float]:
        found = {"sample_kl": sum(self.kls) / len(self.kls)}
        return found | ({"sample_reward": sum(self.rewards) / len(self.rewards)} if self.rewards else {})


@torch.no_grad()
def taste(
    cfg: Config, run: Run, model: Llama, tokenizer: Tokenizer, prompts: Sequence[tuple[str, list[int]]], *,
    reference: Reference | MovingReference, score: data.Score | None,
) -> Taste:  # fmt: skip
    """The same prompts and the same random numbers each time, so that what differs is the policy."""
    answers = data.ask(cfg, model, tokenizer, [ids for _, ids in prompts], run.generator("samples"))
    documents = [[answer.document()] for answer in answers]
    policy = answer_logprobs(model, documents)
    with reference.standing() as standing:
        start = answer_logprobs(standing, documents)  # type: ignore[arg-type]
    kls = [(a.sum() - b.sum()).item() for a, b in zip(policy, start, strict=True)]
    found = Taste(answers, [], kls)
    return replace(found, rewards=score([text for text, _ in prompts], found.texts)) if score else found


def report(cfg: Config, run: Run, before: dict[str, float], after: dict[str, float], first: Taste, last: Taste) -> None:
    """The results; the default run and the toy have targets, any other has to beat its own start."""
    own = cfg.data is not None or cfg.reward not in (None, "vader")
    if last.rewards:
        n = len(last.rewards)
        error = torch.tensor(last.rewards).std().item() / n**0.5 if n > 1 else None
        base = first.means["sample_reward"]
        run.result("sample_reward", last.means["sample_reward"], error=error, baseline=base,
                   target=base + (0 if own else 1.5))  # fmt: skip
    run.result("sample_kl", last.means["sample_kl"], baseline=0.0, target=None if own else 10.0, higher=False)
    wanted = 0.5 if own else 0.8 if cfg.model == "scratch" else 0.65
    run.result("held_out_accuracy", after["held_out_accuracy"], baseline=0.5, target=wanted)
    if "clear_accuracy" in after:
        run.result("clear_accuracy", after["clear_accuracy"], baseline=0.5,
                   target=0.5 if own else 0.9 if cfg.model == "scratch" else 0.7)  # fmt: skip
    run.result("held_out_chosen_logprob", after["held_out_chosen_logprob"], baseline=before["held_out_chosen_logprob"])
    for name in ("held_out_rejected_logprob", "held_out_margin"):
        run.check(name, after[name])
