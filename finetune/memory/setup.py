"""The inputs and the output of the memory formulas: a model's shape, how it is trained, and a term in bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import UserError

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama or GPT-2, see `shape_of`."""

    family: Literal["llama", "gpt"]
    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    max_length: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.family == "gpt":
            return {
                "qkv": (self.dim, 3 * self.dim),
                "o": (self.dim, self.dim),
                "up": (self.dim, self.hidden),
                "down": (self.hidden, self.dim),
            }
        return {
            "q": (self.dim, q),
            "k": (self.dim, kv),
            "v": (self.dim, kv),
            "o": (q, self.dim),
            "gate": (self.dim, self.hidden),
            "up": (self.dim, self.hidden),
            "down": (self.hidden, self.dim),
        }


def shape_of(config: Any) -> Shape:
    """Shape of a LlamaConfig or GPTConfig, or of a dict with their fields (finetune/lm/presets.py)."""
    get: Callable[..., Any] = (
        config.get if isinstance(config, dict) else lambda key, default=None: getattr(config, key, default)
    )
    llama = get("rope_theta") is not None
    dim, heads = get("dim"), get("heads")
    return Shape(
        family="llama" if llama else "gpt",
        vocab=get("vocab_size"),
        dim=dim,
        layers=get("layers"),
        heads=heads,
        kv_heads=get("kv_heads") or heads,
        head_dim=get("head_dim") or dim // heads,
        hidden=get("hidden") or 4 * dim,
        max_length=get("max_length") or (2048 if llama else 1024),
        tied=True if not llama else bool(get("tied", True)),
    )


@dataclass(frozen=True)
class Setup:
    """How the model is trained. `optimizer="none"` is inference: no gradients, a cache of batch · seq tokens."""

    batch: int = 1  # rows of a micro-batch; a row of packed documents counts as one
    seq: int = 2048  # tokens of a row, padding included
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the parameters
    optimizer: Literal["adamw", "none"] = "adamw"  # none: inference
    master: bool = True  # the optimizer keeps parameters of 16 bits a second time, in fp32
    moments: Literal["fp32", "8bit"] = "fp32"  # of the optimizer; 8bit: a byte, and 4 bytes for 256 of them
    lora_rank: int = 0  # rank of LoRA adapters; 0: all parameters are trained
    lora_targets: str = "all"  # linear layers with an adapter, separated by commas
    adapter: Literal["lora", "dora", "pissa"] = "lora"  # dora trains magnitudes too; pissa keeps its first A, B
    quantized: Literal["none", "nf4", "nf4_double", "int8"] = "none"  # form of frozen linear layers
    prompt: int = 0  # prompt tuning: only this many vectors before each row are trained; seq includes them
    prefix: int = 0  # prefix tuning: only this many keys and values before each row, in each layer, are trained
    checkpointing: bool = False  # keep only the blocks' inputs and compute the rest again
    attention: Literal["flash", "naive"] = "flash"  # naive: ops.attention's reference, which makes T×T matrices
    loss: Literal["chunked", "full"] = "chunked"  # ops.linear_cross_entropy, or cross entropy of all logits
    zero: int = 0  # ZeRO stage: the ranks divide optimizer states (1), gradients too (2), parameters too (3)
    ranks: int = 1  # data-parallel ranks, each with its own batch
    algorithm: Literal["sft", "dpo", "grpo", "ppo"] = "sft"  # which models are in memory with the policy
    kv_dtype: Literal["same", "int8", "fp8"] = "same"  # of the cache; 8 bits: an fp32 scale a token and KV head too
    kv_block: int = 1  # tokens of a block of a paged cache: a row occupies whole ones

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("seq", 1), ("lora_rank", 0), ("prompt", 0), ("prefix", 0), ("ranks", 1),
                            ("zero", 0), ("kv_block", 1)):  # fmt: skip
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)} is too small: it must be at least {least}")
        if self.zero > 3:
            raise UserError(f"--zero {self.zero}: the stages are 0, 1, 2 and 3")
        if sum(map(bool, (self.lora_rank, self.prompt, self.prefix))) > 1:
            raise UserError("--lora-rank, --prompt and --prefix: only one of them can be trained")
        if self.quantized != "none" and self.training and not self.frozen:
            raise UserError(f"--quantized {self.quantized}: such weights cannot be trained; give a --lora-rank")
        if self.quantized != "none" and self.zero > 2:
            raise UserError(f"--quantized {self.quantized}: ZeRO-3 has no formula for such weights")

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def element(self) -> int:
        return BYTES[self.dtype]

    @property
    def training(self) -> bool:
        return self.optimizer != "none"

    @property
    def frozen(self) -> bool:
        """Whether the model's own parameters are frozen, and adapters or virtual tokens are trained."""
        return self.training and bool(self.lora_rank or self.prompt or self.prefix)

    def share(self, count: int, stage: int) -> int:
        """One rank's part of `count` numbers that ZeRO divides from this stage on: 1 / ranks, rounded up."""
        return -(-count // self.ranks) if self.zero >= stage else count

    def targets(self, shape: Shape) -> tuple[str, ...]:
        """The linear layers with an adapter; () without LoRA."""
        if not self.lora_rank or not self.training:
            return ()
        names = tuple(shape.linears) if self.lora_targets == "all" else tuple(self.lora_targets.split(","))
        for name in names:
            if name not in shape.linears:
                known = ", ".join(shape.linears)
                raise UserError(f"--lora-targets: a {shape.family} has no linear layer {name!r}; it has {known}")
        return names


@dataclass(frozen=True)
class Term:
    """One row of the table. `formula` gives `bytes` from the symbols of the module's text."""

    name: str
    bytes: int
    formula: str
    source: str
