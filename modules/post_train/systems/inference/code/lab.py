"""What the experiments share: the model in each weight format, real prompts, and the clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from finetune import ops
from finetune.data import python_docs
from finetune.data.toy_directory import small_llama
from finetune.inference.engine import Engine
from finetune.inference.packed import pack
from finetune.inference.sampler import Sampling
from finetune.lm.io import hub, load
from finetune.lm.llama import Llama, LlamaConfig
from finetune.optim import AdamW, cosine
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config

BLOCK = 16  # tokens of a cache block, as in vLLM
SMALL = LlamaConfig(256, dim=128, layers=3, heads=4, kv_heads=2, hidden=384, max_length=2048)  # tokens are bytes
DRAFT = LlamaConfig(256, dim=64, layers=1, heads=2, kv_heads=1, hidden=192, max_length=2048)


class Lab:
    """The model `cfg.model` and what it is asked. `model` is in fp32; `small_draft` is trained with the small one."""

    def __init__(self, cfg: Config, run: Run) -> None:
        self.cfg, self.run, self.small = cfg, run, cfg.model == "small"
        self.formats: dict[str, Llama] = {}
        if self.small:
            self.encode: Callable[[str], list[int]] = lambda text: list(text.encode())
        else:
            self.path = hub.resolve(cfg.model, run.console)
            run.depends_on("model", self.path)
            self.encode = load.tokenizer(self.path).encode

    @cached_property
    def model(self) -> Llama:
        return (small_llama(SMALL) if self.small else load.llama(self.path)).eval()

    @cached_property
    def small_draft(self) -> Llama:
        return small_llama(DRAFT).eval()

    @cached_property
    def draft(self) -> Llama:
        """A cheaper model with the same vocabulary: the small draft, or the model itself in NF4."""
        return packed(self.small_draft, "bf16") if self.small else self.served("nf4")

    def served(self, format: str = "") -> Llama:
        """The model with its weights in a format, by default --format; made once."""
        format = format or self.cfg.format
        if format not in self.formats:
            self.formats[format] = packed(self.model, format)
        return self.formats[format]

    @cached_property
    def reference(self) -> list[int]:
        """The tokens of the language reference that ships with Python; the last tenth is not trained on."""
        from pydoc_data.topics import topics

        return self.encode("\n\n".join(topics[name] for name in sorted(topics)))

    @cached_property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """Questions on Python and their answers, as tokens, in an order of the run's seed."""
        pairs = python_pairs()
        order = torch.randperm(len(pairs), generator=self.run.generator("pairs")).tolist()
        return [(self.encode(pairs[i].question), self.encode(pairs[i].answer)) for i in order[: self.cfg.requests]]

    def engine(self, model: Llama, tokens: int, sequences: int = 64, **options: object) -> Engine:
        """An engine over `model` whose cache has room for `tokens` tokens of each of `sequences` sequences."""
        blocks = sequences * -(-tokens // BLOCK)
        return Engine(model, blocks, BLOCK, most_sequences=sequences, **options)  # type: ignore[arg-type]

    def decoding(self, model: Llama, batch: int, context: int, most_new: int) -> Engine:
        """An engine in which `batch` sequences of `context` tokens have been read, and are about to be continued."""
        engine = self.engine(model, context + most_new, batch, most_tokens=max(512, batch), prefix_cache=False)
        for i in range(batch):
            engine.add(self.reference[i * context :][:context], Sampling(), most_new)
        while any(one.left > 1 for one in engine.scheduler.running) or engine.scheduler.waiting:
            engine.step()
        return engine


python_pairs = cache(python_docs.python_pairs)


def packed(model: Llama, format: str) -> Llama:
    """A copy with its weights in a format, and activations in bf16 (of fp32: in fp32)."""
    copied = copy.deepcopy(model).to(torch.float32 if format == "fp32" else torch.bfloat16)
    return pack(copied, format)  # type: ignore[return-value]


def seconds(call: Callable[[], object]) -> float:
    """What a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def train(lab: Lab, rows: int = 8, length: int = 128) -> None:
    """Trains the small model and its draft on the reference's bytes (AdamW, warm-up and cosine)."""
    models = {"model": lab.model, "draft": lab.small_draft}
    peak = {"model": 3e-3, "draft": 6e-3}
    optimizers = {name: AdamW(model.parameters(), peak[name]) for name, model in models.items()}
    text = torch.tensor(lab.reference[: len(lab.reference) * 9 // 10])
    steps = lab.cfg.train_steps
    state = models | {f"{name}'s optimizer": optimizer for name, optimizer in optimizers.items()}
    for step in lab.run.steps(steps, state, phase="training"):
        starts = torch.randint(len(text) - length, (rows,), generator=lab.run.generator("rows", step))
        tokens = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
        row = {}
        for name, model in models.items():
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            ops.clip_grad_norm_([p.grad for p in model.parameters() if p.grad is not None], 1.0)
            optimizers[name].step(lr=cosine(step, steps, warmup=10, peak=peak[name]))
            optimizers[name].zero_grad()
            row[f"loss_{name}"] = loss.item()
        lab.run.log(step, **row)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]
