"""Group relative policy optimization: learn from a reward of sampled answers, with the group as the baseline.

    A_i = (r_i − mean(r)) / std(r)  of G answers to one prompt
    loss = −mean over answers of mean over tokens of min(ρ A, clip(ρ, 1 − ε, 1 + ε) A),    ρ = π(y_t) / π_old(y_t)

Shao et al. 2024, arXiv:2402.03300, eq. 3. Reads top to bottom: settings, the run (setup, loop, evaluation), its update
(advantages, loss, gradients), then the parts of that. sampling.py collects the answers, setup.py has what surrounds the
training; the losses are in finetune/alignment/policy_loss.py, and the README explains every metric.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune import memory, ops, optim
from finetune.alignment import group_advantages, kl, policy_loss, samples, shared_prompts
from finetune.alignment.kl import AdaptiveCoefficient, FixedCoefficient
from finetune.alignment.logprobs import Reference, evaluated
from finetune.alignment.policy_loss import Answers, Totals
from finetune.alignment.rollouts import Sampler, mismatch
from finetune.alignment.shared_prompts import Group, Layout
from finetune.errors import UserError
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import stop_ids
from finetune.peft import adapters, bases, lora
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import tasks
from .evaluation import SHOWN, Evaluation, evaluate, report
from .sampling import Judged, collect
from .setup import check, check_vocabulary, load_model, measure_memory, memory_plan

__all__ = ["Config", "main", "memory_plan"]


@dataclass
class Config(config.Config):
    steps: int = 35
    checkpoint_every: int = 10
    model: str = "smollm2"  # a model folder, a .gguf file, smollm2, a hub id, or scratch: a small new Llama
    # --- Task
    # rows of prompts (.jsonl, .json, .csv, .tsv, .parquet) or a folder, whose other columns the reward sees; none: sums
    data: Path | None = None
    raw: bool = False  # --data: texts are continued as they stand; else they are messages for the chat template
    lines: bool = False  # --data: an answer ends with its line; those to sums always do
    # what judges answers, several with weights: sum, format, length, vader, file.py:function, name*0.5; none: sum
    reward: config.TEXTS = ()
    largest: int = bounded(99, at_least=9, at_most=10**9)  # operand of a sum; the smallest is a tenth of it
    shots: int = bounded(3, at_least=0, at_most=100)  # solved sums in front of the one that is asked
    max_length: int = bounded(512, at_least=8, at_most=1 << 26)  # tokens of prompt and answer
    # --- Sampling
    prompts: int = bounded(8, at_least=1, at_most=1 << 16)  # groups of a step
    samples: int = bounded(16, at_least=1, at_most=1 << 16)  # answers of a group
    new_tokens: int = bounded(6, at_least=1, at_most=1 << 16)  # most tokens of an answer
    temperature: float = bounded(1.0, at_least=1e-3, at_most=100)
    # weights of the copy that answers are sampled from, merged with the adapters; modules: no copy, the policy itself
    sampler: Literal["modules", "fp32", "bf16", "int8"] = "bf16"
    dynamic: bool = True  # groups whose answers all have one reward are dropped, and other prompts sampled for them
    refills: int = bounded(3, at_least=0, at_most=1000)  # dynamic: most times that a step samples again
    # --- Advantages
    advantage: Literal["group", "group_centered", "batch", "leave_one_out"] = "group"  # the README says what each is
    # answers cut off at --new-tokens: judged like others, left without a loss, or punished by up to 1 near the end
    overlong: Literal["judged", "masked", "penalty"] = "judged"
    # penalty: tokens before --new-tokens where it begins
    overlong_margin: int = bounded(2, at_least=1, at_most=1 << 16)
    # --- Loss
    loss: Literal[
        "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "luspo", "vespo"
    ] = "grpo"  # the README says what each is  # fmt: skip
    ratio: Literal["token", "sequence"] | None = None  # level of ρ; none: the loss's own
    clip_low: float | None = bounded(None, at_least=0, at_most=1)  # ρ ≥ 1 − this; none: the loss's own
    clip_high: float | None = bounded(None, at_least=0)  # ρ ≤ 1 + this; none: the loss's own
    dual_clip: float = bounded(0.0, at_least=0)  # above 1: the loss of a negative advantage is at most this times −A
    two_sided: float = bounded(0.0, at_least=0)  # above 1 + clip-high: largest ρ of a negative advantage
    epochs: int = bounded(1, at_least=1, at_most=10**6)  # passes over the answers of a step (μ)
    updates: int = bounded(1, at_least=1, at_most=1 << 16)  # parts of a pass, each with a step of the optimizer
    # micro-batches of an update, computed one after the other to save memory
    accumulate: int = bounded(1, at_least=1, at_most=1 << 16)
    kl_weight: float = bounded(0.0, at_least=0)  # of KL(π ‖ π_ref)
    kl_in: Literal["loss", "reward"] = "loss"
    kl_kind: kl.Estimator | None = None  # estimator; none: k3 in the loss, k1 in the reward
    kl_ratio: bool = True  # KL in the loss: the estimate times ρ, without which k3's gradient is another one's
    kl_target: float = bounded(0.0, at_least=0)  # nats an answer that the weight is adapted to; 0: it is fixed
    kl_horizon: float = bounded(2000, above=0)  # answers over which the weight adapts
    entropy: float = bounded(0.0, at_least=0)  # weight of an entropy bonus
    entropy_share: float = bounded(1.0, above=0, at_most=1)  # only this share of tokens, the most uncertain, is learned
    correct_sampler: bool = True  # a sampler that is not quite the policy: its answers are weighted by π_old / sampler
    sampler_cap: float = bounded(2.0, above=0)  # largest such weight
    # --- Method
    method: Literal["lora", "full"] = "lora"  # train adapters on frozen weights, or all weights
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the weights; adapters and optimizer stay in float32
    rank: int = bounded(16, at_least=1, at_most=1 << 16)  # LoRA: rank of the update
    alpha: float = bounded(32.0, above=0)  # LoRA: the update is scaled by alpha / rank
    dropout: float = bounded(0.0, at_least=0, below=1)  # LoRA: probability of dropping an input of the adapters
    targets: str = ",".join(lora.TARGETS)  # LoRA: adapted layers; all-linear: those; head (lm_head) is one too
    # --- Optimizer
    lr: float = bounded(5e-4, at_least=0)  # peak learning rate
    warmup: int = bounded(2, at_least=0, at_most=10**9)  # steps until the peak; from there a cosine to a tenth
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    sft_steps: int = bounded(500, at_least=1, at_most=10**9)  # scratch: steps in which it imitates a careless teacher
    careless: float = bounded(0.28, at_least=0, at_most=1)  # scratch: probability that a bit of the teacher is wrong
    # --- Evaluation
    eval_prompts: int = bounded(512, at_least=1, at_most=10**6)  # prompts held out
    eval_every: int = bounded(10, at_least=0, at_most=10**9)  # steps between evaluations; 0: only before and after

    @classmethod
    def toy(cls) -> Config:
        return cls(
            steps=140, model="scratch", sampler="fp32", dtype="float32", method="full", lr=1e-3, prompts=16,
            new_tokens=7, max_length=32, eval_every=25,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)

    def settings(self) -> policy_loss.Settings:
        """Of the loss."""
        named = policy_loss.NAMED[self.loss]
        own = {"level": self.ratio, "clip_low": self.clip_low, "clip_high": self.clip_high}
        return replace(
            named,
            **{name: value for name, value in own.items() if value is not None},  # type: ignore[arg-type]
            dual_clip=self.dual_clip,
            two_sided=self.two_sided,
            kl_weight=self.kl_weight if self.kl_in == "loss" else 0.0,
            kl_kind=self.kl_kind or "k3",
            kl_ratio=self.kl_ratio,
            entropy=self.entropy,
            entropy_share=self.entropy_share,
            sampler_cap=self.sampler_cap,
        )


MIDWAY = 128  # held-out prompts that are answered during training


def main(cfg: Config, run: Run) -> dict[str, Any]:
    # What cannot fit is refused by the formulas, before the model is read.
    shape, setup = memory_plan(cfg)
    if cfg.max_length > shape.max_length:
        raise UserError(f"--max-length {cfg.max_length}: the model's own is {shape.max_length}")
    memory.check_memory(shape, setup, "--prompts or --samples, more parts with --accumulate")

    # The policy: a chat model, or from scratch a small one that has imitated for a while.
    tokenizer, model = load_model(cfg, run)
    task = tasks.load(cfg, tokenizer)
    check_vocabulary(task, model)
    stops = frozenset(stop_ids(model, tokenizer) | (tasks.line_ends(tokenizer) if task.lines else set()))
    if cfg.method == "lora":
        lora.apply_lora(model, cfg.rank, cfg.alpha, cfg.dropout, lora.parse_targets(cfg.targets), run.generator("lora"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), 0.0), lr=cfg.lr)
    reference = Reference(model)  # the adapters switched off, or a copy
    coefficient = (
        AdaptiveCoefficient(cfg.kl_weight, cfg.kl_target, cfg.kl_horizon)
        if cfg.kl_target
        else FixedCoefficient(cfg.kl_weight)
    )

    run.print(
        f"{len(task.train):,} prompts to train on, {len(task.held_out):,} held out, "
        f"{sum(p.numel() for p in trained.values()):,} parameters are trained; answers of the model before training …"
    )
    sampler = Sampler(model, None if cfg.sampler == "modules" else cfg.sampler)

    def look(most: int = 1 << 30) -> Evaluation:
        sampler.refresh()
        return evaluate(cfg, run, sampler, tokenizer, task, stops, reference, most)

    first = look()
    place: dict[str, Any] = {"next": 0, "kl_weight": cfg.kl_weight, "during": ""}
    for step in run.steps(cfg.steps, {"trained": trained, "optimizer": optimizer, "place": place}):
        coefficient.value = place["kl_weight"]
        lr = optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        sampler.refresh()
        found = collect(cfg, run, sampler, tokenizer, task, stops, place)
        learned = update(cfg, model, optimizer, list(trained.values()), reference, found.groups, coefficient, lr)
        place["kl_weight"] = coefficient.value
        run.log(step, **found.metrics, trained_groups=len(found.groups), **learned, lr=lr)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            midway = look(MIDWAY)
            run.log(step, held_out_greedy=midway.greedy.mean, held_out=midway.sampled.mean, sample_kl=midway.kl)
            if step + 1 >= cfg.steps / 2 and not place["during"]:
                place["during"] = json.dumps(midway.texts[:SHOWN])

    # Saved first: whatever fails below, what was trained is kept.
    base = bases.base_name(cfg.model) if cfg.method == "lora" and cfg.model != "scratch" else None
    adapters.save_trained(model, tokenizer, run.dir / "model", base)
    last = look()
    prompts = [prompt.text for prompt in task.held_out[:SHOWN]]
    earned = [{"reward": f"{a:g} → {b:g}"} for a, b in zip(first.rewards, last.rewards, strict=True)]
    during = json.loads(place["during"] or "[]")
    samples.show(run, prompts, first.texts[:SHOWN], during, last.texts[:SHOWN], earned)
    report(cfg, run, first, last)
    measure_memory(cfg, run, shape, setup, model, optimizer, sampler, tokenizer, task, stops)
    run.next_commands = bases.next_commands(run.dir)[: 1 if cfg.model == "scratch" or cfg.method == "full" else None]
    return {"trained_parameters": sum(p.numel() for p in trained.values())}


# --- The algorithm: a loss of the answers' tokens, gradients, a step of the optimizer


@dataclass
class Part:
    """Answers of a micro-batch: their row, and what is fixed while the policy changes."""

    layout: Layout
    advantages: Tensor  # (N,)
    sampler: Tensor  # (n,) log-probabilities that the sampler drew the tokens with
    old: Tensor | None = None  # (n,) log π_old
    reference: Tensor | None = None  # (n,) log π_ref
    entropies: Tensor | None = None  # (n,) of π_old
    chosen: Tensor | None = None  # (n,) bool


@dataclass
class Update:
    """One step of the optimizer: its parts, and what their losses are divided by."""

    parts: list[Part]
    totals: Totals


def update(
    cfg: Config, model: Llama, optimizer: torch.optim.Optimizer, trained: Sequence[Tensor], reference: Reference,
    groups: Sequence[Judged], coefficient: FixedCoefficient | AdaptiveCoefficient, lr: float,
) -> dict[str, float]:  # fmt: skip
    """`cfg.epochs` passes over the groups, each of `cfg.updates` optimizer steps. Without a gradient (no group has
    spread) nothing is changed."""
    settings = replace(cfg.settings(), kl_weight=coefficient.value if cfg.kl_in == "loss" else 0.0)
    everything = bool(cfg.kl_weight or cfg.entropy)  # else an answer without advantage has no gradient
    if cfg.kl_in == "reward" and cfg.kl_weight and groups:
        charge_for_kl(cfg, model, reference, groups, coefficient.value)
    set_advantages(cfg, groups)
    updates = [u for u in divided(cfg, groups, everything) if u.parts]
    if cfg.kl_weight and cfg.kl_in == "loss":
        for part in (p for u in updates for p in u.parts):
            with reference.standing() as standing, torch.no_grad():
                part.reference = shared_prompts.token_logprobs(standing, part.layout, cfg.temperature)[0]
    if cfg.epochs * cfg.updates > 1 or cfg.entropy_share < 1:
        remember(cfg, model, updates)
    seen: list[dict[str, float]] = []
    for epoch in range(cfg.epochs):
        for i, one in enumerate(updates):
            sums = dict.fromkeys(("loss", "kl", "clipped", "ratio", "approximate_kl", "entropy", "tokens"), 0.0)
            for part in one.parts:
                logprobs, entropies = shared_prompts.token_logprobs(model, part.layout, cfg.temperature)
                if part.old is None or epoch == i == 0:
                    part.old = logprobs.detach()  # the policy has not changed yet: the ratio is exactly 1
                answers = Answers(
                    logprobs, part.old, part.layout.owners, part.advantages, entropies, part.reference,
                    part.sampler if cfg.correct_sampler else None, part.chosen,
                )  # fmt: skip
                found = policy_loss.policy_loss(answers, one.totals, settings)
                found.loss.backward()
                sums["loss"] += found.loss.item()
                for name in ("kl", "clipped", "ratio", "approximate_kl"):
                    sums[name] += getattr(found, name)
                sums["entropy"] += entropies.sum().item()
                sums["tokens"] += len(logprobs)
            sums["grad_norm"] = float(ops.clip_grad_norm_([p.grad for p in trained if p.grad is not None], cfg.clip))
            optimizer.step(lr=lr)  # type: ignore[call-overload]
            optimizer.zero_grad()
            seen.append(sums)
    metrics = summarized(cfg, seen, updates)
    if cfg.kl_weight and groups:
        count = cfg.samples * len(groups)
        if cfg.kl_in == "reward":
            metrics["kl"] = sum(one.kl for one in groups) / len(groups)
        elif seen:
            metrics["kl"] = sum(one["kl"] for one in seen[: cfg.updates]) / count
        coefficient.update(metrics.get("kl", 0.0), count)
        metrics["kl_weight"] = coefficient.value
    return metrics


def set_advantages(cfg: Config, groups: Sequence[Judged]) -> None:
    if groups:
        found = group_advantages.advantages(torch.stack([one.rewards for one in groups]), cfg.advantage)
        for one, advantages in zip(groups, found, strict=True):
            one.advantages = advantages


def divided(cfg: Config, groups: Sequence[Judged], everything: bool) -> Iterator[Update]:
    """The groups in `cfg.updates` updates of `cfg.accumulate` parts. One mask for all: an answer that is masked counts
    nowhere. One whose advantage is 0 counts in what sums are divided by, and is computed only if `everything` is."""
    rows = []  # of each group: (answer, the sampler's log-probabilities, advantage)
    for one in groups:
        answers = zip(one.rollout.answers, one.rollout.sampled, one.advantages.tolist(), strict=True)
        counts = [yes or cfg.overlong != "masked" for yes in one.rollout.finished]
        rows.append([row for row, yes in zip(answers, counts, strict=True) if yes])
    tokens = sum(len(answer) for row in rows for answer, *_ in row)
    for start, stop in bounds(len(groups), cfg.updates):
        own = rows[start:stop]
        # The tokens of all updates alike, or of this one alone (bnpo).
        share = sum(len(a) for row in own for a, *_ in row) if cfg.loss == "bnpo" else tokens / cfg.updates
        parts = []
        for a, b in bounds(len(own), cfg.accumulate):
            prompts = [one.rollout.prompt for one in groups[start + a : start + b]]
            learned = [[answer for answer in row if answer[2] or everything] for row in own[a:b]]
            if any(learned):
                flat = [answer for row in learned for answer in row]
                layout = Layout([Group(p, [x[0] for x in row]) for p, row in zip(prompts, learned, strict=True) if row])
                sampler = torch.cat([sampled for _, sampled, _ in flat])
                parts.append(Part(layout, torch.tensor([advantage for *_, advantage in flat]), sampler))
        yield Update(parts, Totals(sum(map(len, own)), share, cfg.new_tokens))


def bounds(count: int, parts: int) -> list[tuple[int, int]]:
    edges = [i * count // parts for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(edges) if a < b]


@torch.no_grad()
def remember(cfg: Config, model: Llama, updates: Sequence[Update]) -> None:
    """What the policy gives to the answers before it changes, and which tokens are uncertain enough to be learned."""
    for one in updates:
        for part in one.parts:
            with evaluated(model):
                part.old, part.entropies = shared_prompts.token_logprobs(model, part.layout, cfg.temperature)
        if cfg.entropy_share < 1:
            entropies = [part.entropies for part in one.parts if part.entropies is not None]
            chosen = policy_loss.most_uncertain(torch.cat(entropies), cfg.entropy_share)
            for part, mine in zip(one.parts, chosen.split([len(e) for e in entropies]), strict=True):
                part.chosen = mine


@torch.no_grad()
def charge_for_kl(
    cfg: Config, model: Llama, reference: Reference, groups: Sequence[Judged], weight: float
) -> None:  # fmt: skip
    """Subtracts the weighted estimate of KL(π ‖ π_ref), the sum over an answer's tokens, from its reward."""
    for a, b in bounds(len(groups), cfg.updates * cfg.accumulate):
        layout = Layout([one.rollout.group for one in groups[a:b]])
        with evaluated(model):
            old = shared_prompts.token_logprobs(model, layout, cfg.temperature)[0]
        with reference.standing() as standing:
            base = shared_prompts.token_logprobs(standing, layout, cfg.temperature)[0]
        estimates = kl.estimate(cfg.kl_kind or "k1", old, base)
        costs = torch.zeros(cfg.samples * (b - a)).index_add(0, layout.owners, estimates).split(cfg.samples)
        for one, cost in zip(groups[a:b], costs, strict=True):
            one.rewards = one.rewards - weight * cost
            one.kl = cost.mean().item()


def summarized(cfg: Config, seen: Sequence[dict[str, float]], updates: Sequence[Update]) -> dict[str, float]:
    """Means over the step's updates and their tokens."""
    if not seen:
        return {}
    tokens = sum(one["tokens"] for one in seen)
    found = {name: sum(one[name] for one in seen) / len(seen) for name in ("loss", "grad_norm")}
    found |= {
        name: sum(one[name] for one in seen) / tokens for name in ("clipped", "ratio", "approximate_kl", "entropy")
    }
    parts = [part for one in updates for part in one.parts]
    old = [part.old for part in parts if part.old is not None]
    found |= mismatch(torch.cat(old), torch.cat([part.sampler for part in parts]))
    return found
