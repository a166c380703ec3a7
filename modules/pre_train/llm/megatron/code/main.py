"""Megatron: one GPT trained by several processes, and the same losses as by one.

    layers split over tp ranks · blocks over pp · rows over dp · the text over cp: world = tp · pp · dp · cp

This process reads the text and asks its ranks for each step (finetune/distributed/launch.py); what a rank does in a
step is `ParallelModel.gradients` (finetune/distributed/model.py). Reads top to bottom: settings, the run, its parts.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune import memory, ops, optim
from finetune.data import ngram
from finetune.data.text import character_tokenizer, encoded, open_text
from finetune.distributed import plan, schedules, sharded, volume, work
from finetune.distributed.experts import MixtureSettings
from finetune.distributed.launch import Ranks
from finetune.distributed.mesh import Layout
from finetune.distributed.stage import initial
from finetune.errors import UserError
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io import save
from finetune.lm.llama import Llama, LlamaConfig
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import plots
from .shards import Shards

NGRAM = 2_000_000  # characters that the bigram sees at most, the last ones of the text to train on


@dataclass
class Config(config.Config):
    steps: int = 1000
    checkpoint_every: int = 250
    threads: int = bounded(1, at_least=0, at_most=1024)  # of this process; a rank has one
    data: Path | None = None  # any UTF-8 text; none: the help pages of this Python (pydoc_data.topics)
    # a sharded checkpoint (checkpoints/shards/… of another run, of any layout) to take weights and optimizer from
    start: Path | None = None
    # --- Layout
    tp: int = bounded(2, at_least=1, at_most=64)  # ranks that share each layer
    pp: int = bounded(2, at_least=1, at_most=64)  # stages of the pipeline
    dp: int = bounded(1, at_least=1, at_most=64)  # ranks that share the rows of a batch
    cp: int = bounded(1, at_least=1, at_most=64)  # ranks that share the tokens of a row
    sequence: bool = False  # sequence parallelism between the split layers
    sharded: bool = False  # AdamW's states are shared out over dp · cp
    # --- Pipeline
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    chunks: int = bounded(1, at_least=1, at_most=64)  # of a stage's blocks, for interleaved
    micro: int = bounded(4, at_least=1, at_most=1 << 20)  # micro-batches of a rank's rows
    # --- Model
    blocks: Literal["gpt2", "llama"] = "gpt2"  # LayerNorm, GELU, learned positions; or RMSNorm, SwiGLU, rotary, GQA
    layers: int = bounded(4, at_least=1, at_most=1 << 12)  # number of blocks
    heads: int = bounded(4, at_least=1, at_most=1 << 16)  # attention heads of a block
    dim: int = bounded(128, at_least=1, at_most=1 << 20)  # width of the residual stream
    length: int = bounded(64, at_least=2, at_most=1 << 24)  # tokens of context
    batch: int = bounded(12, at_least=1, at_most=1 << 24)  # rows of a step, over all ranks
    # --- Optimizer
    lr: float = bounded(1e-3, at_least=0)  # peak learning rate; a cosine falls to a tenth
    warmup: int = bounded(100, at_least=0, at_most=10**9)  # steps until the peak
    weight_decay: float = bounded(0.1, at_least=0)  # AdamW's, on matrices only
    beta2: float = bounded(0.99, at_least=0, below=1)  # AdamW's decay of the squared gradient
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    # --- Experts
    experts: int = bounded(0, at_least=0, at_most=1 << 16)  # in the place of each block's MLP; 0: none
    top: int = bounded(2, at_least=1, at_most=1 << 16)  # experts that a token goes to
    ep: int = bounded(1, at_least=1, at_most=64)  # ranks of dp that share the experts
    capacity: float = bounded(0.0, at_least=0)  # of an expert, in shares of an even load; 0: it takes all that come
    balance: float = bounded(0.01, at_least=0)  # weight of the balance loss
    # --- What a step keeps
    dropout: float = bounded(0.0, at_least=0, below=1)  # of what attention and MLP add; not while layouts are compared
    # made again in the backward pass: outputs of norms and activations, or all of a block but its input
    recompute: Literal["none", "selective", "block"] = "none"
    # --- What is compared
    compare: int = bounded(20, at_least=0, at_most=10**6)  # steps that one process, and other layouts, repeat
    timeout: float = bounded(60.0, above=0, at_most=86400)  # seconds until a collective that a rank misses is an error
    check: bool = True  # before each collective the ranks compare what they are about to call
    # ---
    # control: the training text's characters in random order, so that only their frequencies can be learned
    shuffle: bool = False

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=500, tp=1, pp=2)

    @property
    def layout(self) -> Layout:
        return Layout(tp=self.tp, pp=self.pp, dp=self.dp, cp=self.cp, ep=self.ep)

    @property
    def mixture(self) -> MixtureSettings | None:
        return MixtureSettings(self.experts, self.top, self.capacity, self.balance) if self.experts else None


# --- The algorithm


def main(cfg: Config, run: Run) -> dict[str, Any]:
    text = open_text(cfg.data)
    tokenizer = character_tokenizer(text.pieces(0, text.cut))
    train = encoded(tokenizer, text.pieces(0, text.cut), run.dir)  # (N,)
    held_out = encoded(tokenizer, text.pieces(text.cut), run.dir)
    if cfg.shuffle:
        train = train[torch.randperm(len(train), generator=run.generator("shuffle")).numpy()]
    if len(train) <= cfg.length or len(held_out) <= cfg.length:
        raise UserError(f"the text is too short: {len(held_out)} held-out tokens, rows of {cfg.length}")
    shape, layout = model_config(cfg, tokenizer.vocab_size), cfg.layout
    for stage in range(cfg.pp):
        schedules.steps(cfg.schedule, cfg.pp, cfg.micro, stage, cfg.chunks)
    plan.check(shape, cfg.tp, cfg.pp * cfg.chunks, cfg.cp, cfg.length, cfg.sequence)
    memory.check_memory(shape, memory_plan_of(cfg), "--dim, --layers, --length or --batch")
    run.print(f"{text.characters:,} characters (sha256 {text.digest}); {layout.world} ranks: {layout}")
    seen, unseen = text.pieces(max(0, text.cut - NGRAM), text.cut), text.pieces(text.cut, text.cut + NGRAM // 9)
    bigram = ngram.held_out_bits("".join(seen), "".join(unseen), order=2)["bigram"]
    rows = partial(batch, train, cfg, run)

    with Ranks(layout.world, timeout=cfg.timeout, check=cfg.check, folder=run.dir, on_line=logged(run)) as ranks:
        # What one process gets in the first steps, and what this layout and others of as many ranks do.
        alone = [] if cfg.experts else one_process(cfg, shape, rows)
        found = compared(cfg, ranks, shape, rows, alone, run) if alone else {}

        # The run: every step is one call, which all ranks answer with the same loss and norm.
        begin(cfg, ranks, shape, layout, announce=True, dropout=cfg.dropout, mixture=cfg.mixture)
        if cfg.start is not None and not run.resume:
            ranks.call(work.load, cfg.start)
        shards = Shards(ranks, run.dir / "checkpoints" / "shards")
        speeds: list[float] = []
        for step in run.steps(cfg.steps, {"shards": shards}):
            clock = perf_counter()
            lr = learning_rate(cfg, step)
            loss, norm = ranks.call(work.step, step, rows(step), lr, cfg.clip)[0]
            shards.step = step + 1
            speeds.append(cfg.batch * cfg.length / (perf_counter() - clock))
            run.log(step, loss=loss, grad_norm=norm, lr=lr)

        # What the ranks trained, as one model that the wider world opens; the held-out text by both.
        folder = shards.write("final")
        model = None if cfg.experts else sharded.whole_model(folder, shape)
        if model is not None:
            save.model(model, run.dir / "model", tokenizer)
        else:
            run.print(f"no model/: the wider world has no such model with experts; its shards are in {folder}")
        windows = rows_of(held_out, cfg.length)
        nats, count = map(sum, zip(*(ranks.call(work.loss, part)[0] for part in windows.split(96)), strict=True))
        if cfg.steps:  # one more step, which changes nothing, shows when the ranks do what
            ranks.call(work.step, cfg.steps, rows(cfg.steps - 1), 0.0, cfg.clip)
            show_pipeline(cfg, run, ranks.call(work.trace))
            if cfg.experts:
                balance, dropped = ranks.call(work.mixture)[0]
                run.check("balance", balance)
                run.check("choices_without_room", dropped)

    bits = nats / count * len(held_out) / (text.characters - text.cut) / math.log(2)
    run.result("held_out_bits", bits, baseline=bigram, target=bigram, higher=False)
    if model is not None:
        with torch.no_grad():
            joined = sum(language_loss(model, part, "sum").item() for part in windows.split(96)) / count
        run.result("joined_difference", abs(joined - nats / count), target=1e-5, higher=False)
    if found:
        run.result("largest_difference", max(each.difference for each in found.values()), target=1e-5, higher=False)
        counted, formula = (
            sum(map(total, lists)) for lists in zip(*(each[1:] for each in found.values()), strict=True)
        )
        run.result("bytes_over_formula", counted / formula if formula else 1.0, target=1.01, higher=False)
        plots.sent(run, found)
        for name, each in found.items():
            run.check(f"difference_{name.replace(' · ', '_').replace(' ', '')}", each.difference, at_most=1e-5)
    if speeds:
        run.check("tokens_per_second", median(speeds))
    run.check("bigram_bits", bigram)
    run.check("ranks", layout.world)
    plots.scaling(run)
    return {"held_out_nats": nats / count}


def one_process(cfg: Config, shape: plan.Config, rows: Any) -> list[float]:
    """The losses of the first steps without any of finetune.distributed but the initial weights."""
    model = GPT(shape) if isinstance(shape, GPTConfig) else Llama(shape)
    weights = initial(shape, cfg.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name))
    optimizer = optim.AdamW(optim.decay_groups(model.parameters(), cfg.weight_decay), betas=(0.9, cfg.beta2))
    losses = []
    for step in range(min(cfg.compare, cfg.steps)):
        loss = language_loss(model, rows(step))
        loss.backward()
        ops.clip_grad_norm_([p.grad for p in model.parameters() if p.grad is not None], cfg.clip)
        optimizer.step(lr=learning_rate(cfg, step))
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Found(NamedTuple):
    """A layout's first steps: the largest difference from one process's loss, and the bytes of a step, rank by rank."""

    difference: float
    counted: list[Any]
    formula: list[Any]


def compared(
    cfg: Config, ranks: Ranks, shape: plan.Config, rows: Any, alone: list[float], run: Run
) -> dict[str, Found]:
    """The first steps by the layout of this run, and by others of as many ranks."""
    found = {}
    for layout in (cfg.layout, *other_layouts(cfg)):
        options = begin(cfg, ranks, shape, layout)
        largest = 0.0
        for step, loss in enumerate(alone):
            answers = ranks.call(work.step, step, rows(step), learning_rate(cfg, step), cfg.clip)
            largest = max(largest, *(abs(other - loss) for other, _ in answers))
        sizes: dict[str, Any] = {"rows": cfg.batch, "length": cfg.length}
        options = {key: options[key] for key in ("chunks", "sequence", "sharded") if key in options}
        formula = [volume.of_step(shape, layout, rank, **sizes, **options) for rank in range(layout.world)]
        found[str(layout)] = Found(largest, ranks.call(work.sent), formula)
    rows_shown = [
        {"layout": name, "largest difference": f"{each.difference:.1e}", "MB a step": f"{total(each.counted):.3f}"}
        for name, each in found.items()
    ]
    run.table(f"the first {len(alone)} losses next to one process's; what all ranks send", rows_shown)
    return found


def total(sent: list[Any]) -> float:
    return sum(sum(each.values()) for each in sent) / 1e6


def other_layouts(cfg: Config) -> list[Layout]:
    """Layouts with as many ranks that this model and batch allow, one kind of parallelism or two."""
    world, found = cfg.layout.world, []
    for first in ("tp", "pp", "dp", "cp"):
        for second in ("tp", "pp", "dp", "cp"):
            sizes = {first: world} if first == second else {first: 2, second: world // 2}
            layout = Layout(**sizes)
            heads = cfg.heads if cfg.blocks == "gpt2" else kv_heads(cfg)
            fits = layout.tp <= heads and layout.pp <= cfg.layers and cfg.length % (2 * layout.cp) == 0
            if layout.world == world and fits and layout != cfg.layout and layout not in found and world > 1:
                found.append(layout)
    return found


def begin(cfg: Config, ranks: Ranks, shape: plan.Config, layout: Layout, **also: Any) -> dict[str, Any]:
    """Makes the model again on every rank; the layout of this run with its options, another with the plain ones."""
    options: dict[str, Any] = {"length": cfg.length, "micro": cfg.micro, "recompute": cfg.recompute, **also}
    if layout == cfg.layout:
        options |= {"schedule": cfg.schedule, "chunks": cfg.chunks, "sequence": cfg.sequence, "sharded": cfg.sharded}
    optimizer = {"weight_decay": cfg.weight_decay, "betas": (0.9, cfg.beta2)}
    ranks.call(work.begin, shape, layout, cfg.seed, optimizer, **options)
    return options


def learning_rate(cfg: Config, step: int) -> float:
    return optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)


# --- Batches and loss


def batch(train: np.ndarray, cfg: Config, run: Run, step: int) -> Tensor:
    """Rows (B, T + 1) that start anywhere in the text: a function of (seed, step), as in nanogpt."""
    starts = torch.randint(len(train) - cfg.length, (cfg.batch,), generator=run.generator("batch", step))
    return torch.from_numpy(train[(starts[:, None] + torch.arange(cfg.length + 1)).numpy()].astype(np.int64))


def rows_of(tokens: np.ndarray, length: int) -> Tensor:
    """Rows (B, length + 1) that lie end to end; what is left over is omitted."""
    starts = torch.arange(0, len(tokens) - length, length)
    return torch.from_numpy(tokens[(starts[:, None] + torch.arange(length + 1)).numpy()].astype(np.int64))


def language_loss(model: GPT | Llama, rows: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Cross entropy (nats) of each next token of rows (B, T + 1)."""
    hidden = model(rows[:, :-1], hidden=True)  # (B, T, C)
    return ops.linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, rows[:, 1:].flatten(), reduction=reduction)


# --- Results


def logged(run: Run) -> Any:
    """Shows each line that a rank prints, with its rank."""
    return lambda rank, text: run.print(f"[rank {rank}] {text}")


def show_pipeline(cfg: Config, run: Run, traces: list[Any]) -> None:
    """The last step's passes of every stage (of the first rank of each): timeline.png, trace.json, the idle share."""
    lines = [(events, live) for place, events, live in traces if place["tp"] == place["dp"] == place["cp"] == 0]
    events = [event for events, _ in lines for event in events]
    plan_of_stages = [schedules.steps(cfg.schedule, cfg.pp, cfg.micro, s, cfg.chunks) for s in range(cfg.pp)]
    plots.timeline(run, events, schedules.simulate(plan_of_stages), cfg.pp)
    if cfg.pp > 1:
        run.check("bubble_measured", schedules.bubble(events, cfg.pp))
        run.check("bubble_formula", schedules.ideal_bubble(cfg.pp, cfg.micro, cfg.chunks))
        most = max(live for _, live in lines)
        limit = {"1f1b": min(cfg.pp, cfg.micro), "gpipe": cfg.micro}.get(cfg.schedule)
        run.check("micro_batches_held", most, at_most=limit)


# --- Model and memory


def kv_heads(cfg: Config) -> int:
    return cfg.heads // 2 if cfg.heads % 2 == 0 else cfg.heads


def model_config(cfg: Config, vocab: int) -> plan.Config:
    if cfg.blocks == "gpt2":
        return GPTConfig(vocab, cfg.dim, cfg.layers, cfg.heads, cfg.length)
    hidden = -(-8 * cfg.dim // 3 // 32) * 32
    return LlamaConfig(vocab, cfg.dim, cfg.layers, cfg.heads, kv_heads(cfg), hidden, cfg.length)


def memory_plan_of(cfg: Config) -> memory.Setup:
    """How a rank trains a micro-batch, for the memory formulas."""
    own = -(-cfg.batch // cfg.dp)
    return memory.Setup(
        batch=-(-own // cfg.micro), seq=cfg.length // cfg.cp, tp=cfg.tp, pp=cfg.pp, ranks=cfg.dp * cfg.cp,
        zero=int(cfg.sharded), sequence_parallel=cfg.sequence,
    )  # fmt: skip


def memory_plan(cfg: Config) -> tuple[plan.Config, memory.Setup]:
    """What is trained and how, for `python -m finetune memory megatron`; nothing is made."""
    text = open_text(cfg.data)
    return model_config(cfg, character_tokenizer(text.pieces(0, text.cut)).vocab_size), memory_plan_of(cfg)
