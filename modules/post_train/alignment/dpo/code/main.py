"""Direct preference optimization: learn from pairs of a better and a worse answer, without a reward model.

    h(y) = log π(y | x) − log π_ref(y | x),        loss = −log σ(β · (h(chosen) − h(rejected)))

Rafailov et al. 2023, arXiv:2305.18290, eq. 7. Reads top to bottom: settings, loss and gradients, the run (setup, loop,
evaluation), then its parts. `losses.py` has the other losses of its kind; the README explains every metric.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from finetune import memory, ops, optim
from finetune.alignment import logprobs, rewards
from finetune.alignment.logprobs import Reference
from finetune.alignment.toy_writer import learn_to_write, toy_tokenizer
from finetune.data import packing, preview
from finetune.data.packing import Batch, Document
from finetune.data.toy_directory import small_config, small_llama
from finetune.errors import UserError
from finetune.inference.packed import pack
from finetune.lm import head
from finetune.lm.io import hub, load, save, smollm2
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.peft import adapters, bases, lora
from finetune.runs import config, display
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import data
from .data import Answer, Pair, Sets
from .losses import LOSSES, Divergence, Pairs, Settings, kto, kto_kl, length_desensitized, wpo_weight

CLEAR = 2.5  # a gap of the reward at which a pair is clear


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
    beta: float = bounded(0.1, above=0)  # how strongly the policy is held to the reference; its share of ORPO's loss
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
    lr: float = bounded(1e-3, at_least=0)  # peak learning rate
    warmup: int = bounded(8, at_least=0, at_most=10**9)  # steps until the peak; from there a cosine to a tenth
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    batch: int = bounded(8, at_least=1, at_most=1 << 20)  # pairs of a step (kto: single answers)
    # micro-batches of a step, computed one after the other to save memory
    accumulate: int = bounded(1, at_least=1, at_most=1 << 20)
    checkpointing: bool = False  # keep only the blocks' inputs and compute the rest again: less memory, more time
    sft_steps: int = bounded(250, at_least=1, at_most=10**9)  # scratch: steps in which the reference learns to write
    # --- Evaluation
    eval_pairs: int = bounded(400, at_least=1, at_most=10**9)  # most held-out pairs
    eval_prompts: int = bounded(450, at_least=1, at_most=10**6)  # openings held out
    samples: int = bounded(128, at_least=1, at_most=1 << 16)  # answers sampled before and after
    sample_every: int = bounded(20, at_least=0, at_most=10**9)  # steps between 32 answers; 0: only before and after
    new_tokens: int = bounded(24, at_least=1, at_most=1 << 16)  # most tokens of a sampled answer
    temperature: float = bounded(1.0, at_least=1e-3, at_most=100)  # of sampling

    @classmethod
    def toy(cls) -> Config:
        return cls(
            steps=100, model="scratch", lr=3e-4, batch=16, warmup=5, prompts=600, eval_prompts=200, max_length=48,
            gap=1.0, new_tokens=12, eval_pairs=200, sample_every=25, checkpoint_every=50,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        lora.parse_targets(self.targets)
        if self.accumulate > self.batch:
            raise UserError(f"--accumulate {self.accumulate} exceeds the batch of {self.batch} pairs")
        if self.accumulate > 1 and self.loss in ("aot", "aot_unpaired", "kto"):
            raise UserError(f"--loss {self.loss} looks at the whole batch at once: omit --accumulate")
        if self.weighted and self.loss in ("aot", "aot_unpaired", "kto"):
            raise UserError(f"--weighted is for losses of single pairs, which {self.loss} is not: omit it")
        if self.loss == "exo" and not self.smoothing:
            raise UserError("--loss exo compares with smoothed labels: give --smoothing 0.01, for example")
        if self.smoothing and self.loss not in SMOOTHED:
            raise UserError(f"--smoothing changes nothing in --loss {self.loss}: it is for {', '.join(SMOOTHED)}")
        if self.divergence != "reverse_kl" and self.loss not in DIVERGENT:
            raise UserError(
                f"--divergence {self.divergence} is for losses of a pair's difference ({', '.join(DIVERGENT)}), "
                f"not for {self.loss}: its constant would not cancel"
            )
        if self.loss == "kto" and (self.sft_weight or self.length_alpha < 1):
            raise UserError("--sft-weight and --length-alpha are for pairs: --loss kto has single answers; omit them")
        if self.loss == "kto" and self.batch < 2:
            raise UserError("--loss kto takes its KL from answers to the batch's other prompts: --batch 2 or more")
        if self.sync_every and self.reference != "live":
            raise UserError("--sync-every moves the reference: give --reference live too")
        if self.sync_mix < 1 and self.method == "lora":
            raise UserError(
                "--sync-mix: a mix of two adapters is no adapter of the same rank: omit it, or --method full"
            )
        if self.reward is not None:
            rewards.find(self.reward)

    def settings(self) -> Settings:
        return Settings(self.beta, self.smoothing, self.gamma, self.divergence, self.f_alpha, self.ipo_sum)


SMOOTHED = ("sigmoid", "robust", "exo", "aot", "aot_unpaired", "simpo")
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo", "robust", "discopop")


# --- The algorithm: log-probabilities of the two answers, a loss of each pair, gradients


def pairs_of(cfg: Config, policy: Tensor, reference: Tensor, batch: Batch) -> Pairs:
    """Sums over answers. policy, reference (n,): log p of the learned tokens of B chosen, then B rejected answers."""
    counts = logprobs.lengths(batch)  # (2B,)
    if cfg.length_alpha < 1:
        shared = torch.minimum(*counts.chunk(2)).repeat(2).repeat_interleave(counts)  # (n,)
        places = torch.cat([torch.arange(n) for n in counts.tolist()])
        policy, reference = (length_desensitized(x, places, shared, cfg.length_alpha) for x in (policy, reference))
    chosen, rejected = logprobs.sequence_sums(policy, batch).chunk(2)
    reference_chosen, reference_rejected = logprobs.sequence_sums(reference, batch).chunk(2)
    return Pairs(chosen, rejected, reference_chosen, reference_rejected, *counts.chunk(2))


def pair_losses(cfg: Config, model: Llama, batch: Batch, reference: Tensor) -> tuple[Tensor, Pairs]:
    """((B,) losses with gradients, what they were computed from) of B chosen answers followed by B rejected ones."""
    policy = logprobs.token_logprobs(model, batch)  # (n,)
    pairs = pairs_of(cfg, policy, reference, batch)
    loss = LOSSES[cfg.loss][1](pairs, cfg.settings())
    if cfg.weighted:
        chosen, rejected = wpo_weights(model, batch, policy).chunk(2)
        loss = loss * chosen * rejected
    if cfg.sft_weight:
        plain = logprobs.sequence_sums(policy, batch) / logprobs.lengths(batch)  # a token, of all tokens
        loss = loss - cfg.sft_weight * plain.chunk(2)[0]
    return loss, pairs


@torch.no_grad()
def wpo_weights(model: Llama, batch: Batch, policy: Tensor) -> Tensor:
    """(2B,): `losses.wpo_weight` of each answer, with a forward pass for Σ_v p(v)²."""
    hidden = model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens, hidden=True)[0]
    counted = hidden[batch.targets[0] != packing.IGNORE]
    logps = (head.logits(model, part).float().log_softmax(-1) for part in counted.split(256))
    squares = torch.cat([(2 * part).logsumexp(-1) for part in logps])
    counts = logprobs.lengths(batch).tolist()
    return torch.stack([wpo_weight(p, s) for p, s in zip(policy.split(counts), squares.split(counts), strict=True)])


def kto_losses(
    cfg: Config, model: Llama, documents: Sequence[Document], good: Tensor, reference: Callable[[Batch], Tensor]
) -> tuple[Tensor, Tensor]:
    """((B,) losses, (B,) log ratios) of single answers; the KL is estimated by answers to the batch's other prompts."""
    batch, crossed = packing.collate(documents), packing.collate(mismatched(documents))
    with torch.no_grad():
        apart = logprobs.token_logprobs(model, crossed) - reference(crossed)
    h = logprobs.sequence_sums(logprobs.token_logprobs(model, batch) - reference(batch), batch)
    kl = kto_kl(logprobs.sequence_sums(apart, crossed))
    return kto(h, good, kl, cfg.beta, (cfg.good_weight, cfg.bad_weight)), h


def mismatched(documents: Sequence[Document]) -> list[Document]:
    """Each prompt with the answer to the next one."""
    cuts = [list(d.mask).index(1) for d in documents]
    found = []
    for i, (d, cut) in enumerate(zip(documents, cuts, strict=True)):
        j = (i + 1) % len(documents)
        other = documents[j]
        answer, mask = list(other.ids)[cuts[j] :], list(other.mask)[cuts[j] :]
        found.append(Document(list(d.ids)[:cut] + answer, [0] * cut + mask))
    return found


def accumulate_gradients(
    cfg: Config, model: Llama, examples: Sequence[Pair], references: Callable[[Sequence[Pair], Batch], Tensor]
) -> dict[str, float]:
    """Adds the gradient of the mean loss over the pairs, `cfg.accumulate` parts one after the other; returns the means
    of the metrics."""
    bounds = [i * len(examples) // cfg.accumulate for i in range(cfg.accumulate + 1)]
    found: list[tuple[Tensor, Pairs]] = []
    for start, stop in pairwise(bounds):
        part = examples[start:stop]
        batch = collate(part)
        loss, pairs = pair_losses(cfg, model, batch, references(part, batch))
        (loss.sum() / len(examples)).backward()  # of the step's pairs, not of the part's
        found.append((loss.detach(), pairs))
    means = [{"loss": loss, **described(cfg, pairs)} for loss, pairs in found]
    return {name: torch.cat([part[name] for part in means]).double().mean().item() for name in means[0]}


def collate(pairs: Sequence[Pair]) -> Batch:
    """All chosen answers, then all rejected ones, end to end without padding."""
    return packing.collate([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])


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
    sets = load_pairs(cfg, run, model, tokenizer)
    score = scorer(cfg)
    if cfg.method == "lora":
        lora.apply_lora(model, cfg.rank, cfg.alpha, cfg.dropout, lora.parse_targets(cfg.targets), run.generator("lora"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), 0.0), lr=cfg.lr)
    model.gradient_checkpointing = cfg.checkpointing
    reference = MovingReference(model, trained) if cfg.sync_every else Reference(model)
    start = reference if not cfg.sync_every else MovingReference(model, trained)  # what samples are compared with

    # Log-probabilities of the reference: once for all pairs, since it never changes.
    examples, labels = judgments(cfg, sets)
    run.print(
        f"{len(sets.train):,} pairs to train on, {len(sets.held_out):,} held out, "
        f"{sum(p.numel() for p in trained.values()):,} parameters are trained; log-probabilities of the reference …"
    )
    held_out = answer_logprobs(model, flat(sets.held_out))
    before = evaluate(cfg, sets.held_out, held_out, held_out)  # the policy is still the reference
    first = taste(cfg, run, model, tokenizer, sets.prompts[: cfg.samples], start, score)
    known: dict[int, Tensor] = {}
    if cfg.reference == "precomputed" and cfg.loss != "kto":
        documents = flat(sets.train)
        known = dict(zip(map(id, documents), answer_logprobs(model, documents), strict=True))

    def references(part: Sequence[Pair], batch: Batch) -> Tensor:
        if known:
            return torch.cat([known[id(d)] for d in [p.chosen for p in part] + [p.rejected for p in part]])
        return reference.token_logprobs(batch)

    midway: dict[str, Any] = {"texts": ""}
    moving = reference.values if isinstance(reference, MovingReference) else {}
    state = {"trained": trained, "optimizer": optimizer, "midway": midway} | ({"reference": moving} if moving else {})
    for step in run.steps(cfg.steps, state):
        # A function of (seed, step): a resumed run stores no place in the data and still sees the same batches.
        chosen = packing.batch_indices(len(examples), cfg.batch, step, lambda epoch: run.generator("epoch", epoch))
        if cfg.loss == "kto":
            loss, h = kto_losses(cfg, model, [examples[i] for i in chosen], labels[chosen], reference.token_logprobs)
            loss.mean().backward()
            metrics = judged_metrics(cfg, loss, h, labels[chosen])
        else:
            metrics = accumulate_gradients(cfg, model, [examples[i] for i in chosen], references)
        norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
        lr = optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        run.log(step, **metrics, grad_norm=norm, lr=lr)
        if cfg.sync_every and (step + 1) % cfg.sync_every == 0:
            reference.update(cfg.sync_mix)  # type: ignore[union-attr]
        if cfg.sample_every and (step + 1) % cfg.sample_every == 0 and step + 1 < cfg.steps:
            found = taste(cfg, run, model, tokenizer, sets.prompts[:32], start, score)
            run.log(step, **found.means)
            if step + 1 >= cfg.steps / 2 and not midway["texts"]:
                midway["texts"] = json.dumps([answer.text for answer in found.answers])

    # Saved first: whatever fails below, what was trained is kept.
    save_trained(cfg, model, tokenizer, run.dir / "model")
    after = evaluate(cfg, sets.held_out, answer_logprobs(model, flat(sets.held_out)), held_out)
    last = taste(cfg, run, model, tokenizer, sets.prompts[: cfg.samples], start, score)
    show_samples(run, sets.prompts, first, json.loads(midway["texts"] or "[]"), last)
    report(cfg, run, before, after, first, last)
    if cfg.loss != "kto":
        measure_memory(
            cfg, run, shape, setup, model, optimizer, sets.train[: -(-cfg.batch // cfg.accumulate)], references
        )
    run.next_commands = bases.next_commands(run.dir)[: 1 if cfg.model == "scratch" or cfg.method == "full" else None]
    run.check("pairs", len(sets.train) or len(examples))
    return {"trained_parameters": sum(p.numel() for p in trained.values())}


# --- Evaluation


@torch.no_grad()
def answer_logprobs(model: Llama, documents: Sequence[Document]) -> list[Tensor]:
    """log p of each document's learned tokens, without dropout, in the same passes whenever it is called."""
    found: list[Tensor] = []
    with logprobs.evaluated(model):
        for part in logprobs.chunks(documents, 2048):
            batch = packing.collate(part)
            found += logprobs.token_logprobs(model, batch).split(logprobs.lengths(batch).tolist())
    return found


def flat(pairs: Sequence[Pair]) -> list[Document]:
    return [document for pair in pairs for document in (pair.chosen, pair.rejected)]


def evaluate(
    cfg: Config, pairs: Sequence[Pair], policy_logprobs: Sequence[Tensor], reference_logprobs: Sequence[Tensor]
) -> dict[str, float]:
    """Held-out pairs: how often the implicit reward prefers the chosen answer (of all, and of those with a clear gap),
    the margin, and the log-probabilities of the answers, from those of the tokens of `flat(pairs)`."""
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
    def means(self) -> dict[str, float]:
        found = {"sample_kl": sum(self.kls) / len(self.kls)}
        return found | ({"sample_reward": sum(self.rewards) / len(self.rewards)} if self.rewards else {})


@torch.no_grad()
def taste(
    cfg: Config, run: Run, model: Llama, tokenizer: Tokenizer, prompts: Sequence[tuple[str, list[int]]],
    reference: Reference | MovingReference, score: data.Score | None,
) -> Taste:  # fmt: skip
    """The same prompts and the same random numbers each time, so that what differs is the policy."""
    answers = data.ask(cfg, model, tokenizer, [ids for _, ids in prompts], run.generator("samples"))
    documents = [answer.document() for answer in answers]
    policy, kls = answer_logprobs(model, documents), []
    for part, mine in zip(logprobs.chunks(documents, 2048), split_like(policy, documents), strict=True):
        batch = packing.collate(part)
        kls += logprobs.sequence_sums(torch.cat(list(mine)) - reference.token_logprobs(batch), batch).tolist()
    texts = [answer.text for answer in answers]
    return Taste(answers, score([text for text, _ in prompts], texts) if score else [], kls)


def split_like(values: Sequence[Tensor], documents: Sequence[Document]) -> Iterator[Sequence[Tensor]]:
    """The values of each part that `logprobs.chunks` makes of the documents."""
    done = 0
    for part in logprobs.chunks(documents, 2048):
        yield values[done : done + len(part)]
        done += len(part)


def judged_metrics(cfg: Config, loss: Tensor, h: Tensor, good: Tensor) -> dict[str, float]:
    """KTO's: the implicit rewards of good and bad answers of the batch, where it has any."""
    found = {"loss": loss.mean().item()}
    for name, which in (("chosen_reward", good), ("rejected_reward", ~good)):
        if which.any():
            found[name] = cfg.beta * h[which].mean().item()
    return found


def show_samples(
    run: Run, prompts: Sequence[tuple[str, list[int]]], first: Taste, midway: Sequence[str], last: Taste
) -> None:
    """Six of the prompts with their answers before, during and after; samples.json keeps all."""
    rows = []
    for i, (text, _) in enumerate(prompts[: len(first.answers)]):
        row = {"prompt": text, "before": first.answers[i].text}
        if i < len(midway):
            row["during"] = midway[i]
        rows.append(row | {"after": last.answers[i].text})
    run.table("answers of the policy", rows[:6])
    (run.dir / "answers.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


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


def measure_memory(
    cfg: Config, run: Run, shape: LlamaConfig, setup: memory.Setup, model: Llama, optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair], references: Callable[[Sequence[Pair], Batch], Tensor],
) -> None:  # fmt: skip
    """A step's memory next to its prediction. Both answers of a pair lie in one batch."""
    from dataclasses import replace

    batch = collate(pairs)
    setup = replace(setup, seq=batch.tokens.numel())
    memory.record_step(
        run, shape, setup, model=model, optimizer=optimizer,
        loss=lambda: pair_losses(cfg, model, batch, references(pairs, batch))[0].mean(),
    )  # fmt: skip


# --- The reference that follows


class MovingReference:
    """TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): the reference takes over the policy's weights now and then.
    Only the trained tensors are held twice; they change places with the policy's for a forward pass."""

    def __init__(self, model: Llama, trained: dict[str, torch.nn.Parameter]) -> None:
        self.model, self.trained = model, trained
        self.values = {name: p.detach().clone() for name, p in trained.items()}

    @torch.no_grad()
    def update(self, mix: float) -> None:
        """values ← mix · policy + (1 − mix) · values."""
        for name, p in self.trained.items():
            self.values[name].lerp_(p, mix)

    @torch.no_grad()
    def token_logprobs(self, batch: Batch) -> Tensor:
        with logprobs.evaluated(self.model), self.exchanged():
            return logprobs.token_logprobs(self.model, batch)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        own = {name: p.data for name, p in self.trained.items()}
        for name, p in self.trained.items():
            p.data = self.values[name]
        try:
            yield
        finally:
            for name, p in self.trained.items():
                p.data = own[name]


# --- Data, model and files


def load_pairs(cfg: Config, run: Run, model: Llama, tokenizer: Tokenizer) -> Sets:
    """The pairs of --data, or of the model's own answers."""
    if cfg.data is not None:
        sets = judged_sets(cfg, tokenizer, run.print) if cfg.loss == "kto" else data.read(cfg, tokenizer, run.print)
    else:
        total = cfg.prompts + cfg.eval_prompts
        texts = data.openings(total) if cfg.model != "scratch" else toy_prompts(cfg)
        sampler = model if cfg.model == "scratch" else packed(cfg)
        with run.console.status("sampling") as status:
            sets = data.sampled(
                cfg, sampler, tokenizer, texts, required(scorer(cfg)), run.generator("pairs"),
                run.dir / "pairs.json", status.update,
            )  # fmt: skip
    packing.check_vocabulary(flat(sets.train) + flat(sets.held_out), model.config.vocab_size)
    if cfg.flipped:
        rng = random.Random(cfg.seed)
        turned = set(rng.sample(range(len(sets.train)), round(cfg.flipped * len(sets.train))))
        sets.train = [Pair(p.rejected, p.chosen, p.gap) if i in turned else p for i, p in enumerate(sets.train)]
    return sets


def required(score: data.Score | None) -> data.Score:
    assert score
    return score


def packed(cfg: Config) -> Llama:
    """A second copy of the model in int8, which samples several times as fast; it is dropped after that."""
    return pack(load.llama(hub.resolve(cfg.model), torch.float32), "int8")  # type: ignore[return-value]


def judged_sets(cfg: Config, tokenizer: Tokenizer, say: Callable[[str], None]) -> Sets:
    """Single judgments of --data, a tenth of each kind held out: a held-out pair is a good answer with a bad one, to
    whichever prompts."""
    rows = data.judged(cfg, tokenizer, say)
    kinds = [[d for d, good in rows if good == which] for which in (True, False)]
    cut = [max(1, len(part) // 10) if len(part) > 1 else 0 for part in kinds]
    if not all(cut):
        raise UserError(f"{cfg.data}: two good and two bad answers are the least, to train and to evaluate on")
    held = [part[:n] for part, n in zip(kinds, cut, strict=True)]
    pairs = [Pair(good, bad) for good in held[0] for bad in held[1]][: cfg.eval_pairs]
    # Trained on as judgments, not as pairs: each is listed once, in the order of the file.
    first = {id(d) for part in held for d in part}
    train = [(d, good) for d, good in rows if id(d) not in first]
    sets = Sets([], pairs, [(tokenizer.decode(p), p) for p in prompts_of(held[0] + held[1])][: cfg.samples])
    sets.judged = train
    return sets


def prompts_of(documents: Sequence[Document]) -> list[list[int]]:
    return [list(d.ids)[: list(d.mask).index(1)] for d in documents]


def judgments(cfg: Config, sets: Sets) -> tuple[Sequence[Any], Tensor]:
    """What steps draw from: pairs; for KTO documents, with their labels (N,)."""
    if cfg.loss != "kto":
        return sets.train, torch.zeros(0, dtype=torch.bool)
    rows = sets.judged or [(d, good) for p in sets.train for d, good in ((p.chosen, True), (p.rejected, False))]
    return [d for d, _ in rows], torch.tensor([good for _, good in rows])


def scorer(cfg: Config) -> data.Score | None:
    """What judges samples; None where people's pairs are the only judge."""
    if cfg.reward is not None:
        return data.scorer(cfg.reward)
    if cfg.data is not None:
        return None
    return data.toy_score if cfg.model == "scratch" else data.scorer("vader")


def toy_prompts(cfg: Config) -> list[str]:
    """The toy's openings, as often as needed."""
    texts = data.toy_openings()
    total = cfg.prompts + cfg.eval_prompts
    return (texts * -(-total // len(texts)))[:total]


def load_model(cfg: Config, run: Run) -> tuple[Tokenizer, Llama]:
    """Tokenizer and reference model."""
    if cfg.model != "scratch":
        source = hub.resolve(cfg.model, run.console)
        if source != smollm2.cached():  # whose files are known by their hash already
            run.depends_on("model", source)
        return load.tokenizer(source), load.llama(source, getattr(torch, cfg.dtype))
    tokenizer = toy_tokenizer()
    model = small_llama(small_config(tokenizer.vocab_size, cfg.max_length)).to(getattr(torch, cfg.dtype))
    learn_to_write(run, model, tokenizer, cfg.sft_steps)
    return tokenizer, model


def save_trained(cfg: Config, model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """The adapter as peft opens it, or the whole model as transformers does, with the tokenizer."""
    if cfg.method == "lora" and cfg.model != "scratch":
        adapters.save_adapter(model, folder, bases.base_name(cfg.model))
        save.tokenizer(tokenizer, folder)
        return
    lora.merge(model, keep=True)
    save.model(model, folder, tokenizer)
    lora.unmerge(model)


def memory_plan(cfg: Config) -> tuple[LlamaConfig, memory.Setup]:
    """What is trained and how, for the memory formulas; nothing is loaded. Sampled answers end after --new-tokens."""
    if cfg.model == "scratch":
        shape = small_config(toy_tokenizer().vocab_size, cfg.max_length)
    else:
        shape = load.llama_config(cfg.model)
    longest = cfg.max_length if cfg.data else min(cfg.max_length, cfg.new_tokens + 24)
    return shape, memory.Setup(
        batch=1,
        seq=2 * longest * -(-cfg.batch // cfg.accumulate),  # the answers of a micro-batch lie end to end in one
        dtype="fp32" if cfg.dtype == "float32" else "bf16",
        lora_rank=cfg.rank if cfg.method == "lora" else 0,
        lora_targets=",".join(lora.parse_targets(cfg.targets)),
        checkpointing="block" if cfg.checkpointing else "none",
        algorithm="dpo",
    )


def dry_run(cfg: Config, console: Console) -> None:
    """`--dry-run`: shows three answers of --data as the model sees them, and counts; reads no weights."""
    if cfg.data is None:
        raise UserError("--dry-run shows the rows of --data: without it the pairs are sampled by the model")
    tokenizer = toy_tokenizer() if cfg.model == "scratch" else load.tokenizer(hub.resolve(cfg.model, console))
    sets = data.read(cfg, tokenizer, lambda text: display.say(console, text))
    shown = {"train": flat(sets.train), "held_out": flat(sets.held_out)}
    preview.show(console, shown, tokenizer, cfg.max_length, False, 2 * cfg.batch * cfg.steps)
