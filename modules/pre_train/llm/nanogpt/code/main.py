"""Pre-training of a language model: predict the next token of a text.

    loss = − 1/N Σ_t log p(x_t | x_<t)

GPT-2 (Radford et al. 2019) in the size of nanoGPT's CPU setting, or a Llama of the same size. Reads top to bottom:
settings, loss, the run (setup, loop, evaluation), then its parts. The README explains every metric and every choice.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch

from finetune import memory, ops, optim
from finetune.data import ngram
from finetune.data.text import character_tokenizer, encoded, open_text
from finetune.errors import UserError
from finetune.inference.generate import check_sampling, generate
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io import save
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import bpe
from .cost import flops_per_token, matmul_rate

SCHEDULES = {"cosine": optim.cosine, "wsd": optim.wsd, "constant": optim.constant}
NGRAM = 2_000_000  # characters that the n-gram models see at most, the last ones of the text to train on


@dataclass
class Config(config.Config):
    steps: int = 2000
    checkpoint_every: int = 500
    data: Path | None = None  # any UTF-8 text; none: the help pages of this Python (pydoc_data.topics)
    tokenizer: Literal["char", "bpe"] = "char"  # characters, or byte-level BPE trained on the text
    vocab: int = bounded(512, at_least=1, at_most=1 << 22)  # BPE: number of tokens
    # --- Model
    blocks: Literal["gpt2", "llama"] = "gpt2"  # LayerNorm, GELU, learned positions; or RMSNorm, SwiGLU, rotary, GQA
    layers: int = bounded(4, at_least=1, at_most=1 << 12)  # number of blocks
    heads: int = bounded(4, at_least=1, at_most=1 << 16)  # attention heads of a block
    dim: int = bounded(128, at_least=1, at_most=1 << 20)  # width of the residual stream
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; bfloat16 has float32 masters
    # --- Batches
    length: int = bounded(64, at_least=2, at_most=1 << 24)  # tokens of context
    batch: int = bounded(12, at_least=1, at_most=1 << 24)  # rows of a step
    # micro-batches of a step, computed one after the other to save memory
    accumulate: int = bounded(1, at_least=1, at_most=1 << 24)
    # --- Optimizer
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # of the learning rate, after the warm-up
    lr: float = bounded(1e-3, at_least=0)  # peak learning rate; it falls to a tenth
    warmup: int = bounded(100, at_least=0, at_most=10**9)  # steps until the peak
    weight_decay: float = bounded(0.1, at_least=0)  # AdamW's, on matrices only
    beta2: float = bounded(0.99, at_least=0, below=1)  # AdamW's decay of the squared gradient
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    # --- Evaluation
    eval_every: int = bounded(250, at_least=0, at_most=10**9)  # steps between two evaluations; 0: only at the end
    # rows of an evaluation during training; the last one reads the whole held-out text
    eval_rows: int = bounded(100, at_least=1, at_most=10**9)
    # --- Sampling
    prompt: str = "\n"  # text to continue when training has ended
    sample_tokens: int = bounded(200, at_least=0, at_most=1 << 20)  # tokens to write
    temperature: float = bounded(0.8, at_least=0)  # 0: greedy
    top_k: int = bounded(0, at_least=0, at_most=1 << 22)  # sample among the k likeliest tokens; 0: all
    top_p: float = bounded(0.95, above=0, at_most=1)  # sample among the likeliest tokens that together reach p
    # ---
    # control: the training text's characters in random order, so that only their frequencies can be learned
    shuffle: bool = False

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=500, eval_every=100, threads=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate > self.batch:
            raise UserError(f"--accumulate {self.accumulate} exceeds the batch of {self.batch} rows")
        check_sampling(self.temperature, self.top_k, self.top_p, self.sample_tokens)


# --- The algorithm


def language_loss(model: GPT | Llama, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy (nats) of each next token of rows (B, T + 1); scalar fp32. The logits never exist at once."""
    hidden = model(rows[:, :-1], hidden=True)  # (B, T, C)
    return ops.linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, rows[:, 1:].flatten(), reduction=reduction)


def main(cfg: Config, run: Run) -> dict[str, Any]:
    # What cannot fit is refused by the formulas, before the text is tokenized and the model made.
    text = open_text(cfg.data)
    tokenizer = make_tokenizer(cfg.tokenizer, cfg.vocab, text.pieces(0, text.cut))
    prompt = tokenizer.encode(cfg.prompt)[-cfg.length :]
    if not prompt:
        raise UserError("--prompt is empty: give at least one character")
    shape, setup = model_config(cfg, tokenizer.vocab_size), memory_setup(cfg)
    memory.check_memory(shape, setup, "--dim, --layers, --length or --batch, or more --accumulate")

    # Tokens, model, optimizer.
    train = encoded(tokenizer, text.pieces(0, text.cut), run.dir)  # (N,)
    held_out = encoded(tokenizer, text.pieces(text.cut), run.dir)
    if cfg.shuffle:
        train = train[torch.randperm(len(train), generator=run.generator("shuffle")).numpy()]
    if len(train) <= cfg.length or len(held_out) < 2:
        raise UserError(f"the text is too short: {len(train)} tokens to train on, rows of {cfg.length}")
    run.seed("model")
    model = make_model(shape, cfg.dtype)
    trained = dict(model.named_parameters())
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), cfg.weight_decay), lr=cfg.lr, betas=(0.9, cfg.beta2))
    size = sum(p.numel() for p in trained.values())
    if not run.resume:
        memory.check_disk(run.dir, 16 * 4 * size, "three checkpoints and the model")
    run.print(
        f"{text.characters:,} characters (sha256 {text.digest}), {len(train):,} tokens of {tokenizer.vocab_size} kinds "
        f"to train on; {size:,} parameters"
    )

    # What counting reaches on the same text: the model has to be better.
    seen, unseen = text.pieces(max(0, text.cut - NGRAM), text.cut), text.pieces(text.cut, text.cut + NGRAM // 9)
    baselines = ngram.held_out_bits("".join(seen), "".join(unseen))
    limit = f" (of {NGRAM:,} characters)" if text.cut > NGRAM else ""
    shown = ", ".join(f"{n} {b:.3f}" for n, b in baselines.items())
    run.print(f"held-out bits per character of n-gram models{limit}: {shown}")
    bits_per_nat = len(held_out) / (text.characters - text.cut) / math.log(2)  # nats a token → bits a character

    clock = {"speeds": torch.zeros(min(cfg.steps, 1000))}  # tokens a second of the last steps
    for step in run.steps(cfg.steps, {"trained": trained, "optimizer": optimizer, "clock": clock}):
        began = perf_counter()
        # Rows start anywhere in the text; a function of (seed, step), so that a resumed run reads the same rows.
        starts = torch.randint(len(train) - cfg.length, (cfg.batch,), generator=run.generator("batch", step))
        rows = rows_at(train, starts, cfg.length)  # (B, T + 1)
        loss = 0.0
        for part in rows.tensor_split(cfg.accumulate):
            # Weighted by its rows, so that unequal parts add up to the gradient of the whole batch.
            part_loss = language_loss(model, part) * (len(part) / len(rows))
            part_loss.backward()
            loss += part_loss.item()
        norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
        lr = SCHEDULES[cfg.schedule](step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        clock["speeds"][step % 1000] = rows[:, 1:].numel() / (perf_counter() - began)
        run.log(step, loss=loss, grad_norm=norm, lr=lr)
        # During training some held-out rows are enough to see the curve; the whole text is read after the loop.
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            run.log(step, held_out_bits=evaluate(model, held_out, cfg, cfg.eval_rows) * bits_per_nat)

    # Saved first: whatever fails below, what was trained is kept.
    save.model(model, run.dir / "model", tokenizer)
    nats = evaluate(model, held_out, cfg)
    if cfg.steps:
        run.log(cfg.steps - 1, held_out_bits=nats * bits_per_nat)
    sampling = (cfg.sample_tokens, cfg.temperature, cfg.top_k, cfg.top_p)
    written = generate(model, [prompt], *sampling, generator=run.generator("sample"))[0]
    run.table("what the model writes", [{"prompt": repr(cfg.prompt), "text": tokenizer.decode(written)}])
    bigram = baselines["bigram"]
    run.result("held_out_bits", nats * bits_per_nat, baseline=bigram, target=bigram, higher=False)
    speed = clock["speeds"].median().item() if cfg.steps else None
    if cfg.steps:  # else the optimizer has no states yet
        first = rows_at(train, torch.zeros(setup.batch, dtype=torch.int64), cfg.length)
        step_loss = partial(language_loss, model, first)
        memory.record_step(run, shape, setup, model=model, optimizer=optimizer, loss=step_loss)
    train_nats = evaluate(model, train[: len(held_out)], cfg)
    for name in ("unigram", "bigram"):
        run.check(f"{name}_bits", baselines[name])
    run.check("parameters", size)
    if speed:
        run.check("tokens_per_second", speed)
        run.check("share_of_matmul_rate", speed * flops_per_token(model, cfg.length) / matmul_rate())
    return {
        "held_out_nats": nats,
        "train_nats": train_nats,
        "trigram_bits": baselines["trigram"],
        "five_gram_bits": baselines["five_gram"],
        "text_sha256": text.digest,
    }


def rows_at(tokens: np.ndarray, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Rows (B, length + 1) of consecutive tokens that begin at `starts` (B,)."""
    return torch.from_numpy(tokens[(starts[:, None] + torch.arange(length + 1)).numpy()].astype(np.int64))


@torch.no_grad()
def evaluate(model: GPT | Llama, tokens: np.ndarray, cfg: Config, most: int | None = None) -> float:
    """Mean loss (nats a token) over rows that lie end to end in `tokens`; `most` of them, evenly spaced, or all."""
    length = min(cfg.length, len(tokens) - 1)
    starts = torch.arange(0, len(tokens) - length, length)
    if most is not None and most < len(starts):
        starts = starts[torch.linspace(0, len(starts) - 1, most).long()]
    total = sum(language_loss(model, rows_at(tokens, part, length), "sum").item() for part in starts.split(64))
    return total / (len(starts) * length)


# --- Tokenizer, model and memory


def make_tokenizer(kind: str, vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of a text in pieces: `char`, its characters, or `bpe`, `vocab_size` tokens trained on it."""
    return bpe.train(texts, vocab_size) if kind == "bpe" else character_tokenizer(texts)


def model_config(cfg: Config, vocab: int) -> GPTConfig | LlamaConfig:
    """The shape of the model, with room for a prompt and its continuation."""
    if cfg.blocks == "gpt2":
        return GPTConfig(vocab, cfg.dim, cfg.layers, cfg.heads, cfg.length + cfg.sample_tokens)
    hidden = -(-8 * cfg.dim // 3 // 32) * 32  # SwiGLU has three matrices: 8/3 makes it as large as GELU's two with 4
    kv_heads = cfg.heads // 2 if cfg.heads % 2 == 0 else cfg.heads
    return LlamaConfig(vocab, cfg.dim, cfg.layers, cfg.heads, kv_heads, hidden, cfg.length + cfg.sample_tokens)


def make_model(shape: GPTConfig | LlamaConfig, dtype: str) -> GPT | Llama:
    """A model with random weights."""
    model = GPT(shape) if isinstance(shape, GPTConfig) else Llama(shape)
    return model.to(getattr(torch, dtype))


def memory_setup(cfg: Config) -> memory.Setup:
    """How a micro-batch is trained, for the memory formulas."""
    rows = -(-cfg.batch // cfg.accumulate)
    return memory.Setup(batch=rows, seq=cfg.length, dtype="fp32" if cfg.dtype == "float32" else "bf16")


def memory_plan(cfg: Config) -> tuple[GPTConfig | LlamaConfig, memory.Setup]:
    """What is trained and how, for `python -m finetune memory nanogpt`; nothing is made."""
    text = open_text(cfg.data)
    tokenizer = make_tokenizer(cfg.tokenizer, cfg.vocab, text.pieces(0, text.cut))
    return model_config(cfg, tokenizer.vocab_size), memory_setup(cfg)
