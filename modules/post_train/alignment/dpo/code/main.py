"""Direct preference optimization: learn from pairs of a better and a worse answer, without a reward model.

    h(y) = log π(y | x) − log π_ref(y | x),        loss = −log σ(β · (h(chosen) − h(rejected)))

Rafailov et al. 2023, arXiv:2305.18290, eq. 7. Reads top to bottom: settings, loss and gradients, the run (setup, loop,
evaluation), then its parts. `losses.py` has the other losses of its kind; the README explains every metric.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune import memory, ops, optim
from finetune.alignment import samples
from finetune.alignment.logprobs import Reference, of_states
from finetune.data import packing
from finetune.errors import UserError
from finetune.lm import head
from finetune.lm.llama import Llama
from finetune.peft import adapters, bases, lora
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import data
from .batch import Rows, answer_logprobs
from .data import Pair
from .evaluation import evaluate, report, taste
from .judged import accumulate_kto, judgments
from .losses import LOSSES, Divergence, Pairs, Settings, length_desensitized, wpo_weight
from .reference import MovingReference
from .setup import check, dry_run, load_model, memory_plan

__all__ = ["Config", "dry_run", "main", "memory_plan"]


@dataclass
class Config(config.Config):
    steps: int = 80
    checkpoint_every: int = 20
    model: str = "smollm2"  # a model folder, a .gguf file, smollm2, a hub id, or scratch: a small new Llama
    # --- Pairs
    # rows of preferences (.jsonl, .json, .csv, .tsv, .parquet) or a folder; none: the model's own answers, by --reward
    data: Path | None = None
    raw: bool = False  # --data: texts are continued as they stand; else they are messages for the chat template
    reward: str | None = None  # orders and judges sampled answers: vader, length, …, file.py:function; none: vader
    prompts: int = bounded(1100, at_least=1, at_most=10**6)  # openings that are answered twice to train on
    gap: float = bounded(1.5, at_least=0)  # least difference of the rewards of a sampled pair that is trained on
    max_length: int = bounded(512, at_least=8, at_most=1 << 26)  # tokens of prompt and answer; longer ones are skipped
    flipped: float = bounded(0.0, at_least=0, at_most=1)  # control: share of the training pairs that is turned round
    # --- Loss
    # sigmoid is DPO; kto takes single judgments; the README says what each is
    loss: Literal[
        "sigmoid", "robust", "hinge", "ipo", "exo", "nca", "sppo", "apo_zero", "apo_down", "bco", "aot", "aot_unpaired",
        "discopop", "sigmoid_norm", "simpo", "orpo", "kto"
    ] = "sigmoid"  # fmt: skip
    beta: float = bounded(0.2, above=0)  # how strongly the policy is held to the reference; its share of ORPO's loss
    smoothing: float = bounded(0.0, at_least=0, below=0.5)  # share of labels that are expected to be wrong
    gamma: float = bounded(0.5, at_least=0)  # simpo: margin
    divergence: Divergence = "reverse_kl"  # that holds the policy to the reference
    f_alpha: float = bounded(0.5, at_least=0, at_most=100)  # of --divergence alpha
    ipo_sum: bool = False  # ipo: of sums over tokens, as in its formula, instead of means
    sft_weight: float = bounded(0.0, at_least=0)  # RPO: of the chosen answer's cross entropy, added to the loss
    weighted: bool = False  # WPO: pairs count as the policy's own probability of them, by token
    length_alpha: float = bounded(1.0, at_least=0, at_most=1)  # LD-DPO: weight of tokens beyond the shorter answer
    good_weight: float = bounded(1.0, at_least=0)  # kto: of good answers
    bad_weight: float = bounded(1.0, at_least=0)  # kto: of bad ones
    # --- Reference
    # its log-probabilities are computed once before training, or in each step
    reference: Literal["precomputed", "live"] = "precomputed"
    # TR-DPO: steps after which the reference takes the policy's weights; 0: never
    sync_every: int = bounded(0, at_least=0, at_most=10**9)
    sync_mix: float = bounded(1.0, above=0, at_most=1)  # TR-DPO: how much of the policy it takes
    # --- Method
    method: Literal["lora", "full"] = "lora"  # train adapters on frozen weights, or all weights
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; adapters and optimizer stay in float32
    rank: int = bounded(16, at_least=1, at_most=1 << 16)  # LoRA: rank of the update
    alpha: float = bounded(32.0, above=0)  # LoRA: the update is scaled by alpha / rank
    dropout: float = bounded(0.0, at_least=0, below=1)  # LoRA: probability of dropping an input of the adapters
    targets: str = ",".join(lora.TARGETS)  # LoRA: adapted layers; all-linear: those; head (lm_head) is one too
    # --- Optimizer
    lr: float = bounded(7e-4, at_least=0)  # peak learning rate
    warmup: int = bounded(4, at_least=0, at_most=10**9)  # steps until the peak; from there a cosine to a tenth
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    batch: int = bounded(8, at_least=1, at_most=1 << 20)  # pairs of a step (kto: single answers)
    # micro-batches of a step, computed one after the other to save memory
    accumulate: int = bounded(1, at_least=1, at_most=1 << 20)
    checkpointing: bool = False  # keep only the blocks' inputs and compute the rest again: less memory, more time
    sft_steps: int = bounded(250, at_least=1, at_most=10**9)  # scratch: steps in which the reference learns to write
    # --- Evaluation
    eval_pairs: int = bounded(320, at_least=1, at_most=10**9)  # most held-out pairs
    eval_prompts: int = bounded(360, at_least=1, at_most=10**6)  # openings held out
    samples: int = bounded(128, at_least=1, at_most=1 << 16)  # answers sampled before and after
    sample_every: int = bounded(20, at_least=0, at_most=10**9)  # steps between 32 answers; 0: only before and after
    new_tokens: int = bounded(24, at_least=1, at_most=1 << 16)  # most tokens of a sampled answer
    temperature: float = bounded(1.0, at_least=1e-3, at_most=100)  # of sampling

    @classmethod
    def toy(cls) -> Config:
        return cls(
            steps=100, model="scratch", lr=3e-4, beta=0.1, batch=16, warmup=5, prompts=1000, eval_prompts=200,
            max_length=48, gap=1.0, new_tokens=12, eval_pairs=200, sample_every=25, checkpoint_every=50,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)

    def settings(self) -> Settings:
        return Settings(self.beta, self.smoothing, self.gamma, self.divergence, self.f_alpha, self.ipo_sum)


# --- The algorithm: log-probabilities of the two answers, a loss of each pair, gradients


def collate(pairs: Sequence[Pair]) -> Rows:
    """Chosen and rejected answer of each pair, behind their prompt, which is read once."""
    return Rows([(pair.chosen, pair.rejected) for pair in pairs])


def pairs_of(cfg: Config, policy: Tensor, reference: Tensor, rows: Rows) -> Pairs:
    """Sums over answers of log p of their tokens, (n,) each, which lie in the order of `collate`."""
    if cfg.length_alpha < 1:
        counts = rows.lengths  # (2B,)
        shared = counts.view(-1, 2).amin(1).repeat_interleave(2).repeat_interleave(counts)  # (n,)
        places = torch.cat([torch.arange(n) for n in counts.tolist()])
        policy, reference = (length_desensitized(x, places, shared, cfg.length_alpha) for x in (policy, reference))
    sums = (x.view(-1, 2).unbind(1) for x in (rows.sums(policy), rows.sums(reference), rows.lengths))
    return Pairs(*(x for two in sums for x in two))


def pair_losses(cfg: Config, model: Llama, rows: Rows, reference: Tensor) -> tuple[Tensor, Pairs]:
    """((B,) losses with gradients, what they were computed from); reference (n,): log π_ref of the answers' tokens."""
    states = rows.states(model)  # (n, C)
    policy = of_states(model, states, rows.targets)[0]  # (n,)
    pairs = pairs_of(cfg, policy, reference, rows)
    loss = LOSSES[cfg.loss][1](pairs, cfg.settings())
    if cfg.weighted:
        loss = loss * wpo_weights(model, rows, states, policy).view(-1, 2).prod(1)
    if cfg.sft_weight:
        plain = rows.sums(policy) / rows.lengths  # a token, of all tokens
        loss = loss - cfg.sft_weight * plain.view(-1, 2)[:, 0]
    return loss, pairs


@torch.no_grad()
def wpo_weights(model: Llama, rows: Rows, states: Tensor, policy: Tensor) -> Tensor:
    """(2B,): `losses.wpo_weight` of each answer, for which Σ_v p(v)² is found from the states."""
    logps = (head.logits(model, part).float().log_softmax(-1) for part in states.split(256))
    squares = torch.cat([(2 * part).logsumexp(-1) for part in logps])
    counts = rows.lengths.tolist()
    return torch.stack([wpo_weight(p, s) for p, s in zip(policy.split(counts), squares.split(counts), strict=True)])


def accumulate_gradients(
    cfg: Config, model: Llama, examples: Sequence[Pair], references: Callable[[Sequence[Pair], Rows], Tensor]
) -> dict[str, float]:
    """Adds the gradient of the mean loss over the pairs, `cfg.accumulate` parts one after the other; returns the means
    of the metrics."""
    bounds = [i * len(examples) // cfg.accumulate for i in range(cfg.accumulate + 1)]
    found: list[tuple[Tensor, Pairs]] = []
    for start, stop in pairwise(bounds):
        part = examples[start:stop]
        rows = collate(part)
        loss, pairs = pair_losses(cfg, model, rows, references(part, rows))
        (loss.sum() / len(examples)).backward()  # of the step's pairs, not of the part's
        found.append((loss.detach(), pairs))
    means = [{"loss": loss, **described(cfg, pairs)} for loss, pairs in found]
    return {name: torch.cat([part[name] for part in means]).double().mean().item() for name in means[0]}


def described(cfg: Config, pairs: Pairs) -> dict[str, Tensor]:
    """(B,) metrics of pairs; a margin of 0 counts as half right."""
    chosen, rejected = (h.detach() for h in pairs.ratios)
    return {
        "chosen_reward": cfg.beta * chosen,
        "rejected_reward": cfg.beta * rejected,
        "margin": cfg.beta * (chosen - rejected),
        "accuracy": ((chosen - rejected).sign() + 1) / 2,
        "chosen_logprob": pairs.chosen.detach(),
        "rejected_logprob": pairs.rejected.detach(),
    }


def main(cfg: Config, run: Run) -> dict[str, Any]:
    # What cannot fit is refused by the formulas, before the model is read.
    shape, setup = memory_plan(cfg)
    if cfg.max_length > shape.max_length:
        raise UserError(f"--max-length {cfg.max_length}: the model's own is {shape.max_length}")
    memory.check_memory(shape, setup, "--max-length or --batch, more parts with --accumulate, or --checkpointing")

    # The reference: a chat model, or from scratch a small one that has just learned to write.
    tokenizer, model = load_model(cfg, run)
    sets = data.load_pairs(cfg, run, model, tokenizer)
    if cfg.method == "lora":
        lora.apply_lora(model, cfg.rank, cfg.alpha, cfg.dropout, lora.parse_targets(cfg.targets), run.generator("lora"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), 0.0), lr=cfg.lr)
    model.gradient_checkpointing = cfg.checkpointing
    reference = MovingReference(model, trained) if cfg.sync_every else Reference(model)
    start = MovingReference(model, trained) if cfg.sync_every else reference  # what samples are compared with
    judged: tuple[list[Any], Tensor] = judgments(sets) if cfg.loss == "kto" else (sets.train, torch.zeros(0))
    examples, labels = judged  # documents for KTO, else pairs
    run.print(
        f"{len(sets.train):,} pairs to train on, {len(sets.held_out):,} held out, "
        f"{sum(p.numel() for p in trained.values()):,} parameters are trained; log-probabilities of the reference …"
    )

    def drawn(step: int) -> list[int]:
        # A function of (seed, step): a resumed run stores no place in the data and still sees the same batches.
        return packing.batch_indices(len(examples), cfg.batch, step, lambda epoch: run.generator("epoch", epoch))

    # What the reference says of the pairs that will be seen: once, since it never changes.
    held_out_pairs = data.both(sets.held_out)
    held_out = answer_logprobs(model, held_out_pairs)
    before = evaluate(cfg, sets.held_out, held_out, held_out)  # the policy is still the reference
    taste_of = partial(taste, cfg, run, model, tokenizer, reference=start, score=data.scorer(cfg))
    first = taste_of(sets.prompts[: cfg.samples])
    known: dict[int, Tensor] = {}
    if cfg.reference == "precomputed" and cfg.loss != "kto":
        seen: Sequence[int] = range(len(examples))
        if cfg.steps * cfg.batch < len(examples):
            seen = sorted({i for step in range(cfg.steps) for i in drawn(step)})
        pairs = data.both([sets.train[i] for i in seen])
        known = dict(zip(map(id, data.flat(pairs)), answer_logprobs(model, pairs), strict=True))

    def references(part: Sequence[Pair], rows: Rows) -> Tensor:
        if known:
            return torch.cat([known[id(d)] for d in data.flat(data.both(part))])
        with torch.no_grad(), reference.standing() as standing:
            return rows.logprobs(standing)

    midway: dict[str, Any] = {"texts": ""}
    moving = reference.values if isinstance(reference, MovingReference) else {}
    state = {"trained": trained, "optimizer": optimizer, "midway": midway} | ({"reference": moving} if moving else {})
    for step in run.steps(cfg.steps, state):
        chosen = drawn(step)
        if cfg.loss == "kto":
            metrics = accumulate_kto(cfg, model, [examples[i] for i in chosen], labels[chosen], reference)
        else:
            metrics = accumulate_gradients(cfg, model, [examples[i] for i in chosen], references)
        norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
        lr = optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        run.log(step, **metrics, grad_norm=norm, lr=lr)
        if isinstance(reference, MovingReference) and (step + 1) % cfg.sync_every == 0:
            reference.update(cfg.sync_mix)
        if cfg.sample_every and (step + 1) % cfg.sample_every == 0 and step + 1 < cfg.steps:
            found = taste_of(sets.prompts[:32])
            run.log(step, **found.means)
            if step + 1 >= cfg.steps / 2 and not midway["texts"]:
                midway["texts"] = json.dumps(found.texts)

    # Saved first: whatever fails below, what was trained is kept.
    base = bases.base_name(cfg.model) if cfg.method == "lora" and cfg.model != "scratch" else None
    adapters.save_trained(model, tokenizer, run.dir / "model", base)
    after = evaluate(cfg, sets.held_out, answer_logprobs(model, held_out_pairs), held_out)
    last = taste_of(sets.prompts[: cfg.samples])
    texts = [text for text, _ in sets.prompts[: cfg.samples]]
    samples.show(run, texts, first.texts, json.loads(midway["texts"] or "[]"), last.texts)
    report(cfg, run, before, after, first, last)
    if cfg.loss != "kto":
        part = [examples[i] for i in drawn(0)][: -(-cfg.batch // cfg.accumulate)]
        rows = collate(part)
        memory.record_step(
            run, shape, replace(setup, seq=rows.tokens), model=model, optimizer=optimizer,
            loss=lambda: pair_losses(cfg, model, rows, references(part, rows))[0].mean(),
        )  # fmt: skip
    run.next_commands = bases.next_commands(run.dir)[: 1 if cfg.model == "scratch" or cfg.method == "full" else None]
    run.check("pairs", len(sets.train) or len(examples))
    return {"trained_parameters": sum(p.numel() for p in trained.values())}
