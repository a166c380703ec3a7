"""Bytes of a training step by formula: the language model's (finetune/memory), and the encoder and the projector."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from finetune import memory, optim
from finetune.lm.io import load
from finetune.memory import room
from finetune.memory.setup import Setup, shape_of
from finetune.vision.pretrain import RECIPES, shape
from finetune.vision.vit import ViTConfig

from .data import Batch
from .model import Llava, LlavaConfig

if TYPE_CHECKING:
    from .main import Config


def encoder_parameters(config: ViTConfig) -> int:
    """Patches, class token, positions, blocks of 4 C² + 2 C F and their biases and norms, the norms around them, and
    SigLIP's head, which is a block with a query."""
    c, f = config.dim, config.hidden
    tokens = config.grid[0] * config.grid[1] + config.class_token
    block = 4 * c * (c + 1) + 2 * c * f + c + f
    count = c * (config.channels * config.patch**2 + config.patch_bias) + c * config.class_token
    count += tokens * c * (config.positions == "learned") + config.layers * (block + 4 * c)
    count += 2 * c * (1 + config.pre_norm) + c * config.projection
    return count + (block + 3 * c if config.pooling == "attention" else 0)


def memory_of(config: LlavaConfig, setup: Setup, images: int) -> dict[str, int]:
    """Bytes by name of a step with `images` images. setup: how the language model is trained, its rows with their image
    tokens; `prompt` stands for a frozen one through which a gradient flows to its inputs."""
    terms = {term.name: term.bytes for term in memory.predict(shape_of(config.text), setup)}
    d, c, prompt = config.vision.dim, config.text.dim, setup.prompt * config.text.dim
    projector = c * (d + c + 2)  # parameters, in fp32 as the encoder's
    return {
        "encoder": 4 * encoder_parameters(config.vision),
        "projector": 4 * projector,
        "language model": terms["weights"] - 4 * prompt,
        "gradients": 4 * projector + terms["gradients"] - 4 * prompt,
        "optimizer states": 8 * projector + terms["optimizer states"] - 8 * prompt,
        # Of each vector: the features, both sides of the GELU, and its place among the tokens (row and column).
        "activations": terms["activations"] + images * config.each * (4 * (d + 2 * c) + 16),
    }


def setup_of(cfg: Config, batch: int, seq: int) -> Setup:
    """How the language model is trained in the last stage of a run."""
    how: dict[str, Any] = {"prompt": 1} if not cfg.stages[1] else {"lora_rank": cfg.rank} if cfg.tune == "lora" else {}
    return Setup(batch=batch, seq=seq, dtype="fp32" if cfg.dtype == "float32" else "bf16", **how)


def check_memory(cfg: Config) -> None:
    """UserError if a step cannot fit into this machine's memory, before a model is read. An encoder from a folder is
    not counted: its size is known only when it is there."""
    if cfg.language_model == "scratch":
        return
    vision = shape(RECIPES[cfg.encoder]) if cfg.encoder in RECIPES else shape(RECIPES["digits"])
    config = LlavaConfig(vision, load.llama_config(cfg.language_model), 0, columns=cfg.columns)
    seq = min(cfg.max_length, config.text.max_length)
    found = memory_of(config, setup_of(cfg, cfg.batch, seq), cfg.batch)
    room.check_bytes(sum(found.values()), "--batch or --max-length")


def rows(
    cfg: Config, net: Llava, optimizer: optim.AdamW, batch: Batch, loss: Callable[[], Tensor]
) -> list[dict[str, Any]]:
    """Bytes of a step of the run's last stage, by formula and as measured."""
    found = memory_of(net.config, setup_of(cfg, *batch.tokens.shape), len(batch.images))
    measured = memory.measure(net, optimizer, loss)
    parts = (("encoder", net.encoder), ("projector", net.projector), ("language model", net.language))
    measured |= {name: sum(p.nbytes for p in part.parameters()) for name, part in parts}
    return memory.table(found, measured)
