"""Pre-training of a language model: predict the next token of a text. Reads top to bottom.

    loss = − 1/N Σ_t log p(x_t | x_<t)

GPT-2 (Radford et al. 2019) in the size of nanoGPT's CPU setting, or a Llama of the same size. The README explains every
metric and every choice.
"""

import hashlib
import math
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from finetune import config, memory, ops, optim
from finetune.errors import UserError
from finetune.generate import generate
from finetune.gpt import GPT, GPTConfig
from finetune.llama import Llama, LlamaConfig
from finetune.tokenizer import Tokenizer

from . import bpe, ngram

SCHEDULES = {"cosine": optim.cosine, "wsd": optim.wsd, "constant": optim.constant}
UNKNOWN = "\ufffd"  # what a character that the text does not have is read as


@dataclass
class Config(config.Config):
    steps: int = 2000
    checkpoint_every: int = 500
    data: Path | None = None  # any UTF-8 text; none: the help pages of this Python (pydoc_data.topics)
    tokenizer: Literal["char", "bpe"] = "char"  # characters, or byte-level BPE trained on the text
    vocab: int = 512  # BPE: number of tokens
    blocks: Literal["gpt2", "llama"] = "gpt2"  # LayerNorm, GELU, learned positions; or RMSNorm, SwiGLU, rotary, GQA
    layers: int = 4
    heads: int = 4
    dim: int = 128
    length: int = 64  # tokens of context
    batch: int = 12  # rows of a step
    accumulate: int = 1  # parts in which a step is computed one after the other, for less memory
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; bfloat16 has float32 masters
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    lr: float = 1e-3  # peak learning rate; it falls to a tenth
    warmup: int = 100  # steps until the peak
    weight_decay: float = 0.1  # AdamW's, on matrices only
    beta2: float = 0.99
    clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 250  # steps between two evaluations; 0: only at the end
    eval_rows: int = 100  # rows of an evaluation on the way; the last one reads the whole held-out text
    prompt: str = "\n"
    sample_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    shuffle: bool = (
        False  # control: the training text's characters in random order, so that only their shares are learnt
    )

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=500, eval_every=100, threads=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"layers": 1, "heads": 1, "length": 2, "batch": 1, "accumulate": 1, "eval_every": 0,
                            "eval_rows": 1, "sample_tokens": 0}.items():  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(
                    f"--{config.dashed(name)} {getattr(self, name)} is too small: it must be at least {least}"
                )
        if self.accumulate > self.batch:
            raise UserError(f"--accumulate {self.accumulate}: a step of {self.batch} rows has no so many parts")


# --- The algorithm


def language_loss(model: GPT | Llama, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy (nats) of each next token of rows (B, T + 1); scalar fp32. The logits never exist at once."""
    hidden = model(rows[:, :-1], hidden=True)  # (B, T, C)
    return ops.linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, rows[:, 1:].flatten(), reduction=reduction)


def main(cfg: Config, run):
    text, digest = read_text(cfg)
    train_text, held_out_text = split(text)
    tokenizer = make_tokenizer(cfg, train_text)
    train, held_out = (torch.tensor(tokenizer.encode(part)) for part in (train_text, held_out_text))
    if cfg.shuffle:
        train = train[torch.randperm(len(train), generator=run.generator("shuffle"))]
    if len(train) <= cfg.length or len(held_out) < 2:
        raise UserError(f"the text is too short: {len(train)} tokens to train on, rows of {cfg.length}")
    model = make_model(cfg, tokenizer.vocab_size, run)
    trained = dict(model.named_parameters())
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), cfg.weight_decay), lr=cfg.lr, betas=(0.9, cfg.beta2))
    run.say(
        f"{len(text):,} characters (sha256 {digest}), {len(train):,} tokens of {tokenizer.vocab_size} kinds to train "
        "on; "
        f"{sum(p.numel() for p in trained.values()):,} parameters"
    )
    baselines = ngram_bits(train_text, held_out_text)
    run.say("held-out bits per character of n-gram models: " + ", ".join(f"{n} {b:.3f}" for n, b in baselines.items()))
    per_char = len(held_out) / len(held_out_text) / math.log(2)  # from nats a token to bits a character

    speeds = []
    for step in run.steps(cfg.steps, {"trained": trained, "optimizer": optimizer}):
        began = perf_counter()
        starts = torch.randint(len(train) - cfg.length, (cfg.batch,), generator=run.generator("batch", step))
        rows = train[starts[:, None] + torch.arange(cfg.length + 1)]  # (B, T + 1)
        loss = 0.0
        for part in rows.tensor_split(cfg.accumulate):
            part_loss = language_loss(model, part) * (len(part) / len(rows))
            part_loss.backward()
            loss += part_loss.item()
        norm = ops.clip_grad_norm_([p.grad for p in trained.values()], cfg.clip)
        lr = SCHEDULES[cfg.schedule](step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        speeds.append(rows[:, 1:].numel() / (perf_counter() - began))
        run.log(step, loss=loss, grad_norm=norm, lr=lr)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            run.log(step, held_out_bits=evaluate(model, held_out, cfg, cfg.eval_rows) * per_char)

    nats = evaluate(model, held_out, cfg)
    bits = nats * per_char
    if cfg.steps:
        run.log(cfg.steps - 1, held_out_bits=bits)
    model.save_pretrained(run.dir / "model", tokenizer)
    run.samples("what the model writes", [{"prompt": repr(cfg.prompt), "text": write(model, tokenizer, cfg, run)}])
    run.judge("held_out_bits", bits, baseline=baselines["bigram"], target=baselines["bigram"], higher=False)
    speed = sorted(speeds)[len(speeds) // 2] if speeds else None
    measure_memory(cfg, run, model, optimizer, train)
    return {
        "held_out_nats": nats,
        "train_nats": evaluate(model, train[: len(held_out)], cfg),
        **{f"{name}_bits": value for name, value in baselines.items()},
        "parameters": sum(p.numel() for p in trained.values()),
        "text_sha256": digest,
        "tokens_per_second": speed,
        "share_of_matmul_rate": speed * flops_per_token(model, cfg) / matmul_rate() if speed else None,
    }


@torch.no_grad()
def evaluate(model: GPT | Llama, tokens: torch.Tensor, cfg: Config, most: int | None = None) -> float:
    """Mean loss (nats a token) over rows that lie end to end in `tokens`; `most` of them, evenly spaced, or all."""
    length = min(cfg.length, len(tokens) - 1)
    starts = torch.arange(0, len(tokens) - length, length)
    if most is not None and most < len(starts):
        starts = starts[torch.linspace(0, len(starts) - 1, most).long()]
    rows = tokens[starts[:, None] + torch.arange(length + 1)]
    total = sum(language_loss(model, part, "sum").item() for part in rows.split(64))
    return total / rows[:, 1:].numel()


# --- Text and tokens


def read_text(cfg: Config) -> tuple[str, str]:
    """The text, and twelve digits of its hash: Python's help pages differ from version to version."""
    if cfg.data is None:
        text = "\n".join(page for _, page in sorted(pydoc_data.topics.topics.items()))
    else:
        try:
            text = cfg.data.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--data {cfg.data} cannot be read as UTF-8 text: {e}") from None
        if not text.strip():
            raise UserError(f"--data {cfg.data} is empty")
    return text, hashlib.sha256(text.encode()).hexdigest()[:12]


def split(text: str) -> tuple[str, str]:
    """(to train on, held out): the last tenth is held out."""
    at = len(text) * 9 // 10
    return text[:at], text[at:]


def make_tokenizer(cfg: Config, text: str) -> Tokenizer:
    if cfg.tokenizer == "bpe":
        return bpe.train(text, cfg.vocab)
    vocab = {character: i for i, character in enumerate([UNKNOWN, *sorted(set(text) - {UNKNOWN})])}
    backend = Backend(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


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


def make_model(cfg: Config, vocab: int, run) -> GPT | Llama:
    run.seed("model")
    settings = model_config(cfg, vocab)
    model = GPT(settings) if isinstance(settings, GPTConfig) else Llama(settings)
    return model.to(getattr(torch, cfg.dtype))


def write(model: GPT | Llama, tokenizer: Tokenizer, cfg: Config, run) -> str:
    """Sampled text behind the prompt, whose last tokens are read if it is long."""
    prompt = tokenizer.encode(cfg.prompt)[-cfg.length :]
    if not prompt:
        raise UserError("--prompt is empty: give at least one character")
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
    tokenizer = make_tokenizer(cfg, split(read_text(cfg)[0])[0])
    return model_config(cfg, tokenizer.vocab_size), memory_setup(cfg)


def measure_memory(cfg: Config, run, model: GPT | Llama, optimizer: optim.AdamW, train: torch.Tensor) -> None:
    if not cfg.steps:
        return  # the optimizer has no states yet
    setup = memory_setup(cfg)
    batch = train[: cfg.length + 1].repeat(setup.batch, 1)  # a copy: the whole text is no activation
    run.memory(
        memory.for_training(
            model.config, setup, model=model, optimizer=optimizer, loss=lambda: language_loss(model, batch)
        )
    )
