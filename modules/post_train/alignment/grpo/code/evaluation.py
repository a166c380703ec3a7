"""What the policy answers to held-out prompts before, during and after training, and how far it has moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.alignment import shared_prompts
from finetune.alignment.logprobs import Reference, evaluated
from finetune.alignment.rollouts import Prompt, Sampler
from finetune.alignment.samples import Estimate
from finetune.alignment.shared_prompts import Group, Layout
from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.lm.tokenizer import Tokenizer, answer_text
from finetune.runs.run import Run

from .tasks import Task

if TYPE_CHECKING:
    from .main import Config

SHOWN = 32  # samples that are kept
OF_KL = 64  # answers by which the KL is estimated
LEAST = 128  # sampled answers: of few prompts several each
BLOCK = 16  # tokens of a cache block; prompts share those in which they begin alike


@dataclass(frozen=True)
class Evaluation:
    """Reward of the most likely and of sampled answers, the mean of log π − log π_ref over sampled ones (nats an
    answer), and the first sampled answer to each prompt with its reward."""

    greedy: Estimate
    sampled: Estimate
    kl: float
    texts: list[str]
    rewards: list[float]


def evaluate(
    cfg: Config, run: Run, sampler: Sampler, tokenizer: Tokenizer, task: Task, stops: frozenset[int],
    reference: Reference, most: int = 1 << 30,
) -> Evaluation:  # fmt: skip
    """Of the first `most` held-out prompts, by the same random numbers each time: what differs is the policy."""
    prompts = task.held_out[:most]
    again = -(-LEAST // len(prompts)) if len(prompts) < LEAST else 1
    repeated = [prompt for prompt in prompts for _ in range(again)]
    seeds = torch.randint((1 << 62) - 1, (len(repeated),), generator=run.generator("evaluation")).tolist()
    how = [Sampling() for _ in prompts] + [Sampling(cfg.temperature, seed=seed) for seed in seeds]
    answers = ask(cfg, sampler, [*prompts, *repeated], how, stops)
    texts = [answer_text(tokenizer, answer, stops) for answer in answers]
    greedy, _ = task.judge(prompts, texts[: len(prompts)])
    sampled, _ = task.judge(repeated, texts[len(prompts) :])
    return Evaluation(
        Estimate.of(greedy), Estimate.of(sampled), apart(cfg, reference, prompts, answers[len(prompts) :: again]),
        texts[len(prompts) :: again], sampled[::again],
    )  # fmt: skip


def ask(
    cfg: Config, sampler: Sampler, prompts: Sequence[Prompt], how: Sequence[Sampling], stops: frozenset[int]
) -> list[list[int]]:
    """An answer to each prompt, the token that ended it included."""
    count = min(len(prompts), 128)
    longest = max(len(prompt.ids) for prompt in prompts) + cfg.new_tokens
    with evaluated(sampler.model):
        engine = Engine(
            sampler.model, (count + 1) * -(-longest // BLOCK), BLOCK, most_tokens=1024, most_sequences=count
        )
        found = [engine.add(p.ids, h, cfg.new_tokens, stops) for p, h in zip(prompts, how, strict=True)]
        engine.run()
    return [one.answer for one in found]


@torch.no_grad()
def apart(cfg: Config, reference: Reference, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> float:
    """Mean of log π − log π_ref of some answers, an unbiased estimate of the KL divergence in nats an answer."""
    rows = [Group(p.ids, [answer]) for p, answer in zip(prompts[:OF_KL], answers, strict=False)]
    layout = Layout(rows)
    with evaluated(reference.policy):
        own = shared_prompts.token_logprobs(reference.policy, layout, cfg.temperature)[0]
    with reference.standing() as standing:
        base = shared_prompts.token_logprobs(standing, layout, cfg.temperature)[0]
    return (own - base).sum().item() / len(rows)


def report(cfg: Config, run: Run, first: Evaluation, last: Evaluation) -> None:
    """The results; the default run and the toy have targets, any other has to beat its own start."""
    own = cfg.data is not None or bool(cfg.reward)
    toy = cfg.model == "scratch" and not own
    name = "reward" if own else "accuracy"
    base = first.sampled.mean
    run.result(f"sampled_{name}", last.sampled.mean, error=last.sampled.error, baseline=base,
               target=0.9 if toy else base + (0 if own else 0.25))  # fmt: skip
    run.result(f"greedy_{name}", last.greedy.mean, error=last.greedy.error, baseline=first.greedy.mean)
    run.result("sample_kl", last.kl, baseline=0.0)
    if toy:
        run.check("sampled_accuracy_before", base, at_most=0.25)
