"""Answers of a step, judged: groups of them to prompts that the policy neither always nor never answers well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.alignment import group_advantages
from finetune.alignment.rollouts import Prompt, Rollout, Sampler, rollouts
from finetune.data import packing
from finetune.lm.tokenizer import Tokenizer
from finetune.runs.run import Run

from .tasks import Task

if TYPE_CHECKING:
    from .main import Config


@dataclass
class Judged:
    """A prompt's answers and what they earned."""

    rollout: Rollout
    rewards: Tensor  # (S,)
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))  # (S,)
    kl: float = 0.0  # mean over the answers, nats, where it is charged to the reward


@dataclass
class Collected:
    """The groups of a step that are learned from, and what was seen of all that were sampled."""

    groups: list[Judged]
    metrics: dict[str, float]


def collect(
    cfg: Config, run: Run, sampler: Sampler, tokenizer: Tokenizer, task: Task, stops: frozenset[int],
    place: dict[str, Any],
) -> Collected:  # fmt: skip
    """Samples groups and judges them. Dynamic sampling (DAPO, §3.2): a group whose answers have one reward has no
    gradient, so that other prompts are sampled in its place, `cfg.refills` times at most."""
    kept: list[Judged] = []
    seen: list[Judged] = []
    each: dict[str, list[float]] = {}
    for _ in range(1 + (cfg.refills if cfg.dynamic else 0)):
        prompts = [task.train[i] for i in next_prompts(cfg.prompts - len(kept), len(task.train), run, place)]
        groups = rollouts(
            sampler, tokenizer, [p.ids for p in prompts], cfg.samples, cfg.new_tokens, temperature=cfg.temperature,
            stop_ids=stops, generator=run.generator("answers", place["next"]),
        )  # fmt: skip
        judged = judge(cfg, task, prompts, groups, each)
        seen += judged
        spread = group_advantages.spread(torch.stack([one.rewards for one in judged])).tolist()
        kept += [one for one, differs in zip(judged, spread, strict=True) if differs or not cfg.dynamic]
        if len(kept) == cfg.prompts:
            break
    every = torch.stack([one.rewards for one in seen])
    lengths = torch.tensor([float(len(answer)) for one in seen for answer in one.rollout.answers])
    finished = [yes for one in seen for yes in one.rollout.finished]
    metrics = {
        "reward": every.mean().item(),
        "no_spread": 1 - group_advantages.spread(every).double().mean().item(),
        "sampled_groups": float(len(seen)),
        "answer_tokens": lengths.mean().item(),
        "truncated": 1 - sum(finished) / len(finished),
    }
    if len(each) > 1:
        metrics |= {f"reward_{name}": sum(values) / len(values) for name, values in each.items()}
    return Collected(kept, metrics)


def next_prompts(count: int, total: int, run: Run, place: dict[str, Any]) -> list[int]:
    """Indices of the next prompts of a permutation, which is another one in each pass over the data."""
    places = range(place["next"], place["next"] + count)
    place["next"] += count
    return [packing.batch_indices(total, 1, i, lambda epoch: run.generator("epoch", epoch))[0] for i in places]


def judge(
    cfg: Config, task: Task, prompts: Sequence[Prompt], groups: Sequence[Rollout], each: dict[str, list[float]]
) -> list[Judged]:
    """The groups with their rewards, the penalty of long answers included; `each` gets those by name."""
    repeated = [prompt for prompt in prompts for _ in range(cfg.samples)]
    sums, named = task.judge(repeated, [text for group in groups for text in group.texts])
    for name, values in named.items():
        each.setdefault(name, []).extend(values)
    found = torch.tensor(sums)
    if cfg.overlong == "penalty":
        lengths = [len(a) + (not yes) for g in groups for a, yes in zip(g.answers, g.finished, strict=True)]
        found += group_advantages.overlong_penalty(torch.tensor(lengths), cfg.new_tokens + 1, cfg.overlong_margin)
    parts = found.split(cfg.samples)
    return [Judged(group, r) for group, r in zip(groups, parts, strict=True)]
