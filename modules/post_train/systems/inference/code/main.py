"""Inference: what each idea of a serving engine is worth, measured on one model in one run.

Every file here is one experiment on the engine of `finetune/inference`: `measure` returns plain numbers, `judge`
records what they must show, `picture` draws them. This file runs them in turn.
"""

import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch

from finetune.errors import UserError, nearest
from finetune.memory import Setup, shape_of
from finetune.memory.packed import packed_bytes
from finetune.memory.states import kv_cache
from finetune.ops.quantized_linear import FORMATS
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import batching, blocks, chunked, invariance, load_curve, prefix, quantization, recompute, roofline, speculation
from .lab import BLOCK, Lab, train

EXPERIMENTS: dict[str, ModuleType] = {
    "blocks": blocks,
    "cache": recompute,
    "batching": batching,
    "prefix": prefix,
    "chunked": chunked,
    "speculation": speculation,
    "quantization": quantization,
    "roofline": roofline,
    "load": load_curve,
    "invariance": invariance,
}
Chosen = Literal["all", "blocks", "cache", "batching", "prefix", "chunked", "speculation", "quantization", "roofline",
                 "load", "invariance"]  # fmt: skip


@dataclass
class Config(config.Config):
    steps: int = 10  # each runs one of the ten experiments
    checkpoint_every: int = 1
    experiment: Chosen = "all"  # one of them alone
    model: str = "smollm2"  # a model folder, a .gguf file, smollm2, a hub id, or small: one made and trained here
    format: str = "bf16"  # of the weights, in the experiments that are about something else
    formats: str = "fp32,bf16,int8,int4,nf4"  # of the experiments quantization and roofline, separated by commas
    requests: int = bounded(400, at_least=64, at_most=3000)  # questions and answers whose lengths are served
    rounds: int = bounded(9, at_least=1, at_most=1000)  # times that what is timed takes its turn; medians are shown
    train_steps: int = bounded(160, at_least=1, at_most=10**6)  # of the small model and its draft

    @classmethod
    def toy(cls) -> "Config":
        return cls(model="small", requests=200, rounds=24, threads=1)  # so small a model is fastest on one thread

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, names in (("format", [self.format]), ("formats", self.formats.split(","))):
            for name in names:
                if name not in FORMATS:
                    raise UserError(f"--{option}: '{name}' is not one of {', '.join(FORMATS)}{nearest(name, FORMATS)}")
        if "fp32" not in self.formats.split(","):
            raise UserError("--formats: fp32 is what the others are compared with: add it")


class Found(dict[str, dict[str, Any]]):
    """What each experiment measured; a checkpoint holds it."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update(state)


def main(cfg: Config, run: Run) -> dict[str, Any]:
    names = [name for name in EXPERIMENTS if cfg.experiment in ("all", name)]
    found = Found()
    lab = Lab(cfg, run)
    if lab.small and cfg.steps and names != ["blocks"]:
        train(lab)
    for step in run.steps(min(cfg.steps, len(names)), {"found": found}, phase="experiments"):
        name = names[step]
        began = time.monotonic()
        found[name] = EXPERIMENTS[name].measure(lab)
        run.log(step, seconds=time.monotonic() - began)
    for name in found:
        EXPERIMENTS[name].judge(run, found[name])
        EXPERIMENTS[name].picture(run, found[name])
    if cfg.experiment == "all":
        run.check("experiments", len(found), at_least=len(names))
    if "quantization" in found:
        run.record_memory(sizes(lab))
    return {}


def sizes(lab: Lab) -> list[dict[str, Any]]:
    """Bytes of the weights in each format, and of the cache in each of its formats, by formula and as they are."""
    from finetune.inference.packed import weight_bytes

    shape, rows = shape_of(lab.model.config), []
    for format in lab.cfg.formats.split(","):
        predicted = packed_bytes(shape, format, element=4 if format == "fp32" else 2)
        rows.append(
            {"name": f"{format}: weights", "predicted": predicted, "measured": weight_bytes(lab.served(format))}
        )
    tokens, sequences = 128, 4
    kinds: dict[Any, torch.dtype | None] = {"bf16": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    for kind, dtype in kinds.items():
        engine = lab.engine(lab.served("bf16"), tokens, sequences, cache_dtype=dtype)
        setup = Setup(optimizer="none", batch=sequences, seq=tokens, dtype="bf16", kv_dtype=kind, kv_block=BLOCK)
        predicted = kv_cache(shape, setup).bytes
        rows.append({"name": f"cache in {kind}: KV cache", "predicted": predicted, "measured": engine.cache.nbytes})
    return rows
