"""Pre-training of a language model: predict the next token of a text. Reads top to bottom.

    loss = − 1/N Σ_t log p(x_t | x_<t)

GPT-2 (Radford et al. 2019) in the size of nanoGPT's CPU setting, or a Llama of the same size. The README explains every
metric and every choice.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from finetune import memory, ops, optim
from finetune.errors import UserError
from finetune.lm.generate import check_sampling, generate
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io import save
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import config
from finetune.runs.config import bounded

from . import bpe, ngram
from .text import encoded, open_text

SCHEDULES = {"cosine": optim.cosine, "wsd": optim.wsd, "constant": optim.constant}
UNKNOWN = "\ufffd"  # what a character that the text does not have is read as
NGRAM = 2_000_000  # characters that the n-gram models see at most, the last ones of the text to train on


@dataclass
class Config(config.Config):
    steps: int = 2000
    checkpoint_every: int = 500
    data: Path | None = None  # any UTF-8 text; none: the help pages of this Python (pydoc_data.topics)
    tokenizer: Literal["char", "bpe"] = "char"  # characters, or byte-level BPE trained on the text
    vocab: int = bounded(512, at_least=1, at_most=1 << 22)  # BPE: number of tokens
    blocks: Literal["gpt2", "llama"] = "gpt2"  # LayerNorm, GELU, learned positions; or RMSNorm, SwiGLU, rotary, GQA
    layers: int = bounded(4, at_least=1, at_most=1 << 12)
    heads: int = bounded(4, at_least=1, at_most=1 << 16)
    dim: int = bounded(128, at_least=1, at_most=1 << 20)
    length: int = bounded(64, at_least=2, at_most=1 << 24)  # tokens of context
    batch: int = bounded(12, at_least=1, at_most=1 << 24)  # rows of a step
    # parts in which a step is computed one after the other, for less memory
    accumulate: int = bounded(1, at_least=1, at_most=1 << 24)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; bfloat16 has float32 masters
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    lr: float = bounded(1e-3, at_least=0)  # peak learning rate; it falls to a tenth
    warmup: int = bounded(100, at_least=0, at_most=10**9)  # steps until the peak
    weight_decay: float = bounded(0.1, at_least=0)  # AdamW's, on matrices only
    beta2: float = bounded(0.99, at_least=0, below=1)
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    eval_every: int = bounded(250, at_least=0, at_most=10**9)  # steps between two evaluations; 0: only at the end
    # rows of an evaluation on the way; the last one reads the whole held-out text
    eval_rows: int = bounded(100, at_least=1, at_most=10**9)
    prompt: str = "\n"
    sample_tokens: int = bounded(200, at_least=0, at_most=1 << 20)
    temperature: float = bounded(0.8, at_least=0)
    top_k: int = bounded(0, at_least=0, at_most=1 << 22)
    top_p: float = bounded(0.95, above=0, at_most=1)
    shuffle: bool = (
        False  # control: the training text's characters in random order, so that only their shares are learned
    )

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=500, eval_every=100, threads=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate > self.batch:
            raise UserError(f"--accumulate {self.accumulate}: a step of {self.batch} rows has no so many parts")
        check_sampling(self.temperature, self.top_k, self.top_p, self.sample_tokens)


# --- The algorithm


def language_loss(model: GPT | Llama, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy (nats) of each next token of rows (B, T + 1); scalar fp32. The logits never exist at once."""
    hidden = model(rows[:, :-1], hidden=True)  # (B, T, C)
    return ops.linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, rows[:, 1:].flatten(), reduction=reduction)


def main(cfg: Config, run):
    text = open_text(cfg.data)
    tokenizer = make_tokenizer(cfg, text.pieces(0, text.cut))
    prompt = tokenizer.encode(cfg.prompt)[-cfg.length :]
    if not prompt:
        raise UserError("--prompt is empty: give at least one character")
    shape = model_config(cfg, tokenizer.vocab_size)
    memory.check_memory(shape, memory_setup(cfg), "--dim, --layers, --length or --batch, or more --accumulate")
    parts = text.pieces(0, text.cut), text.pieces(text.cut)
    train, held_out = (encoded(tokenizer, part, run.dir) for part in parts)
    if cfg.shuffle:
        train = train[torch.randperm(len(train), generator=run.generator("shuffle")).numpy()]
    if len(train) <= cfg.length or len(held_out) < 2:
        raise UserError(f"the text is too short: {len(train)} tokens to train on, rows of {cfg.length}")
    model = make_model(cfg, shape, run)
    trained = dict(model.named_parameters())
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), cfg.weight_decay), lr=cfg.lr, betas=(0.9, cfg.beta2))
    size = sum(p.numel() for p in trained.values())
    if not run.resume:
        memory.check_disk(run.dir, 16 * 4 * size, "three checkpoints and the model")
    run.print(
        f"{text.characters:,} characters (sha256 {text.digest}), {len(train):,} tokens of {tokenizer.vocab_size} kinds "
        f"to train on; {size:,} parameters"
    )
    seen = text.pieces(max(0, text.cut - NGRAM), text.cut), text.pieces(text.cut, text.cut + NGRAM // 9)
    baselines = ngram_bits(*map("".join, seen))
    part = f" (of {NGRAM:,} characters)" if text.cut > NGRAM else ""
    run.print(
        f"held-out bits per character of n-gram models{part}: "
        + ", ".join(f"{n} {b:.3f}" for n, b in baselines.items())
    )
    # from nats a token to bits a character
    per_char = len(held_out) / (text.characters - text.cut) / math.log(2)

    clock = {"speeds": torch.zeros(min(cfg.steps, 1000))}  # tokens a second of the last steps
    for step in run.steps(cfg.steps, {"trained": trained, "optimizer": optimizer, "clock": clock}):
        began = perf_counter()
        starts = torch.randint(len(train) - cfg.length, (cfg.batch,), generator=run.generator("batch", step))
        rows = taken(train, starts, cfg.length)  # (B, T + 1)
        loss = 0.0
        for part in rows.tensor_split(cfg.accumulate):
            part_loss = language_loss(model, part) * (len(part) / len(rows))
            part_loss.backward()
            loss += part_loss.item()
        norm = ops.clip_grad_norm_([p.grad for p in trained.values()], cfg.clip)
        lr = SCHEDULES[cfg.schedule](step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        clock["speeds"][step % 1000] = rows[:, 1:].numel() / (perf_counter() - began)
        run.log(step, loss=loss, grad_norm=norm, lr=lr)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            run.log(step, held_out_bits=evaluate(model, held_out, cfg, cfg.eval_rows) * per_char)

    save.model(model, run.dir / "model", tokenizer)
    nats = evaluate(model, held_out, cfg)
    bits = nats * per_char
    if cfg.steps:
        run.log(cfg.steps - 1, held_out_bits=bits)
    written = write(model, tokenizer, prompt, cfg, run)
    run.table("what the model writes", [{"prompt": repr(cfg.prompt), "text": written}])
    run.result("held_out_bits", bits, baseline=baselines["bigram"], target=baselines["bigram"], higher=False)
    speed = clock["speeds"].median().item() if cfg.steps else None
    measure_memory(cfg, run, model, optimizer, train)
    return {
        "held_out_nats": nats,
        "train_nats": evaluate(model, train[: len(held_out)], cfg),
        **{f"{name}_bits": value for name, value in baselines.items()},
        "parameters": size,
        "text_sha256": text.digest,
        "tokens_per_second": speed,
        "share_of_matmul_rate": speed * flops_per_token(model, cfg) / matmul_rate() if speed else None,
    }


def taken(tokens: np.ndarray, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Rows (B, length + 1) of consecutive tokens from these places on."""
    return torch.from_numpy(tokens[(starts[:, None] + torch.arange(length + 1)).numpy()].astype(np.int64))


@torch.no_grad()
def evaluate(model: GPT | Llama, tokens: np.ndarray, cfg: Config, most: int | None = None) -> float:
    """Mean loss (nats a token) over rows that lie end to end in `tokens`; `most` of them, evenly spaced, or all."""
    length = min(cfg.length, len(tokens) - 1)
    starts = torch.arange(0, len(tokens) - length, length)
    if most is not None and most < len(starts):
        starts = starts[torch.linspace(0, len(starts) - 1, most).long()]
    total = sum(language_loss(model, taken(tokens, part, length), "sum").item() for part in starts.split(64))
    return total / (len(starts) * length)


# --- Text and tokens


def make_tokenizer(cfg: Config, texts: Iterable[str]) -> Tokenizer:
    """Of a text in pieces (a text is the sequence of its characters)."""
    if cfg.tokenizer == "bpe":
        return bpe.train(texts, cfg.vocab)
    characters = set(texts) if isinstance(texts, str) else {c for piece in texts for c in set(piece)}
    vocab = {character: i for i, character in enumerate([UNKNOWN, *sorted(characters - {UNKNOWN})])}
    backend = Backend(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, cut=re.compile(r"[\s\S]"))


def ngram_bits(train: str, held_out: str) -> dict[str, float]:
    """Held-out bits per character of character n-grams. Characters that training does not have count as one."""
    vocab = sorted(set(train))
    number = {character: i for i, character in enumerate(vocab, start=1)}
    ids = [np.array([number.get(c, 0) for c in part]) for part in (train, held_out)]
    nats = ngram.held_out_nats(*ids, len(vocab) + 1, 5)
    names = ("unigram", "bigram", "trigram", "four_gram", "five_gram")
    return {name: value / math.log(2) for name, value in zip(names, nats, strict=True) if name != "four_gram"}


# --- Model


def model_config(cfg: Config, vocab: int) -> GPTConfig | LlamaConfig:
    if cfg.blocks == "gpt2":
        return GPTConfig(vocab, cfg.dim, cfg.layers, cfg.heads, cfg.length + cfg.sample_tokens)
    hidden = -(-8 * cfg.dim // 3 // 32) * 32  # SwiGLU has three matrices: 8/3 makes it as large as GELU's two with 4
    kv_heads = cfg.heads // 2 if cfg.heads % 2 == 0 else cfg.heads
    return LlamaConfig(vocab, cfg.dim, cfg.layers, cfg.heads, kv_heads, hidden, cfg.length + cfg.sample_tokens)


def make_model(cfg: Config, settings: GPTConfig | LlamaConfig, run) -> GPT | Llama:
    run.seed("model")
    model = GPT(settings) if isinstance(settings, GPTConfig) else Llama(settings)
    return model.to(getattr(torch, cfg.dtype))


def write(model: GPT | Llama, tokenizer: Tokenizer, prompt: list[int], cfg: Config, run) -> str:
    """Sampled text behind the prompt, whose last tokens are read if it is long."""
    new = generate(
        model, [prompt], cfg.sample_tokens, cfg.temperature, cfg.top_k, cfg.top_p, generator=run.generator("sample")
    )
    return tokenizer.decode(new[0])


# --- What it costs


def flops_per_token(model: GPT | Llama, cfg: Config) -> float:
    """6 a parameter that is multiplied with, and 12 · layers · width · length of attention, of which the causal half is
    computed (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
    looked_up = model.positions.weight.numel() if cfg.blocks == "gpt2" else 0  # the embedding is the head too
    multiplied = sum(p.numel() for p in model.parameters()) - looked_up
    return 6 * multiplied + 6 * cfg.layers * cfg.dim * cfg.length


def matmul_rate(size: int = 1024, seconds: float = 0.2) -> float:
    """FLOPs a second of torch's fp32 matrix product with this run's threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out, best, until = torch.empty(size, size), math.inf, perf_counter() + seconds
    while perf_counter() < until or best == math.inf:
        began = perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, perf_counter() - began)
    return 2 * size**3 / best


def memory_setup(cfg: Config) -> memory.Setup:
    rows = -(-cfg.batch // cfg.accumulate)
    return memory.Setup(batch=rows, seq=cfg.length, dtype="fp32" if cfg.dtype == "float32" else "bf16")


def memory_plan(cfg: Config) -> tuple[GPTConfig | LlamaConfig, memory.Setup]:
    text = open_text(cfg.data)
    tokenizer = make_tokenizer(cfg, text.pieces(0, text.cut))
    return model_config(cfg, tokenizer.vocab_size), memory_setup(cfg)


def measure_memory(cfg: Config, run, model: GPT | Llama, optimizer: optim.AdamW, train: np.ndarray) -> None:
    if not cfg.steps:
        return  # the optimizer has no states yet
    setup = memory_setup(cfg)
    batch = taken(train, torch.zeros(setup.batch, dtype=torch.int64), cfg.length)
    run.record_memory(
        memory.for_training(
            model.config, setup, model=model, optimizer=optimizer, loss=lambda: language_loss(model, batch)
        )
    )
