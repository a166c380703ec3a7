"""The inputs and the output of the memory formulas: a model's shape, how it is trained, and a term in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import UserError, nearest
from finetune.memory.optimizers import OPTIMIZERS
from finetune.memory.possible import check_settings

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama (and its relatives) or GPT-2, see `shape_of`; or of the part of one that a rank holds, see
    finetune/memory/parallel.py."""

    family: Literal["llama", "gpt"]  # the file of finetune/lm with its layers
    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    max_length: int
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    gelu: bool = False  # a gated MLP with GELU
    wide_norms: bool = False  # norms keep their input in fp32 (Gemma's, which multiply by weight + 1)
    capped_scores: bool = False  # attention's scores have a soft cap
    capped_logits: bool = False  # so have the logits: the loss is that of finetune/lm/head.py
    window: int = 0  # tokens that the layers with a sliding window see
    window_layers: int = 0
    first: bool = True  # the part has the embedding
    last: bool = True  # the part has the last norm, the projection to the vocabulary and the loss
    in_flight: int = 1  # micro-batches between their forward and their backward pass

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.family == "gpt":
            return {
                "qkv": (self.dim, 3 * q),
                "o": (q, self.dim),
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

    @property
    def biased(self) -> tuple[str, ...]:
        """The linear layers with a bias."""
        if self.family == "gpt":
            return tuple(self.linears)
        named = (self.qkv_bias, ("q", "k", "v")), (self.o_bias, ("o",)), (self.mlp_bias, ("gate", "up", "down"))
        return tuple(name for has, names in named if has for name in names)

    @property
    def tables(self) -> int:
        """Matrices of the vocabulary: embedding and projection, one if they are tied; a part has those of its ends."""
        return 1 if self.tied and (self.first or self.last) else self.first + self.last


def shape_of(config: Any) -> Shape:
    """Shape of a LlamaConfig or GPTConfig, or of a dict with their fields (finetune/lm/presets.py)."""
    get: Callable[..., Any] = (
        config.get if isinstance(config, dict) else lambda key, default=None: getattr(config, key, default)
    )
    llama = get("rope_theta") is not None
    dim, heads = get("dim"), get("heads")
    same = {name: bool(get(name)) for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "post_norms") if llama}
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
        gelu=get("activation") == "gelu_tanh",
        wide_norms=bool(get("norm_plus_one")),
        capped_scores=bool(get("attention_softcap")),
        capped_logits=bool(get("logit_softcap")),
        window=get("window") or 0,
        window_layers=len(get("window_layers") or ()),
        **same,
    )


@dataclass(frozen=True)
class Setup:
    """How the model is trained. `optimizer="none"` is inference: no gradients, a cache of batch · seq tokens."""

    # --- Tokens
    batch: int = 1  # rows of a micro-batch
    seq: int = 2048  # tokens of a row, padding included; a shorter model's own length if it is not given
    packing: int = 1  # documents of equal length in a row; each sees itself only, and begins at position 0
    # --- Numbers and optimizer
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the parameters
    optimizer: str = "adamw"  # one of the optimizers below; none: inference
    master: bool = True  # the optimizer keeps parameters of 16 bits a second time, in fp32
    grad_dtype: Literal["same", "fp32", "bf16", "fp16"] = "same"  # another than dtype: summed in buffers that stay
    # --- What is trained
    lora_rank: int = 0  # rank of LoRA adapters; 0: all parameters are trained
    lora_targets: str = "all"  # linear layers with an adapter, separated by commas; all: the blocks'; head is one too
    whole: str = ""  # modules trained whole next to LoRA, separated by commas: embed_tokens, lm_head, norm, mlp_norm, …
    untied: bool = False  # of a tied model, --whole trains embedding or head alone, or both apart, as peft does
    adapter: Literal["lora", "dora", "pissa"] = "lora"  # dora trains magnitudes too; pissa keeps its first A, B
    quantized: Literal["none", "nf4", "nf4_double", "int8"] = "none"  # form of frozen linear layers
    prompt: int = 0  # prompt tuning: only this many vectors before each row are trained; seq includes them
    prefix: int = 0  # prefix tuning: only this many keys and values before each row, in each layer, are trained
    # which models are in memory with the policy; rlhf: those of ppo as adapters on the policy's weights
    algorithm: Literal["sft", "dpo", "grpo", "ppo", "rlhf"] = "sft"
    # --- What a step keeps
    # block: keep the blocks' inputs and compute the rest again; selective: compute naive attention again
    checkpointing: Literal["none", "block", "selective"] = "none"
    attention: Literal["flash", "naive"] = "flash"  # naive: ops.attention's reference, which makes T×T matrices
    # ops.linear_cross_entropy, cross entropy of all logits, or the tokens' log-probabilities (alignment/logprobs.py)
    loss: Literal["chunked", "full", "logprobs"] = "chunked"
    # --- Many devices
    zero: int = 0  # ZeRO stage: the ranks divide optimizer states (1), gradients too (2), parameters too (3)
    ranks: int = 1  # data-parallel ranks, each with its own batch
    tp: int = 1  # tensor-parallel ranks: each has a part of every layer's heads, MLP and of the vocabulary
    sequence_parallel: bool = False  # with --tp: what is between the layers' parts is divided along the row
    pp: int = 1  # pipeline stages: each has a part of the layers (1F1B; the stage that needs most is shown)
    # optimizer: its states and the gradients are in the host's memory; parameters: these too
    offload: Literal["none", "optimizer", "parameters"] = "none"
    # --- Inference
    kv_dtype: Literal["same", "fp32", "bf16", "fp16", "int8", "fp8"] = "same"  # 8 bits: an fp32 scale a token and head
    kv_block: int = 1  # tokens of a block of a paged cache: a row occupies whole ones

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("seq", 1), ("lora_rank", 0), ("prompt", 0), ("prefix", 0), ("ranks", 1),
                            ("zero", 0), ("kv_block", 1), ("tp", 1), ("pp", 1), ("packing", 1)):  # fmt: skip
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)} is too small: it must be at least {least}")
        if self.optimizer not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise UserError(f"--optimizer {self.optimizer} is none of {known}{nearest(self.optimizer, OPTIMIZERS)}")
        if self.zero > 3:
            raise UserError(f"--zero {self.zero}: the stages are 0, 1, 2 and 3")
        if sum(map(bool, (self.lora_rank, self.prompt, self.prefix))) > 1:
            raise UserError("--lora-rank, --prompt and --prefix: only one of them can be trained")
        if self.quantized != "none" and self.training and not self.frozen:
            raise UserError(f"--quantized {self.quantized}: such weights cannot be trained; give a --lora-rank")
        if self.quantized != "none" and self.zero > 2:
            raise UserError(f"--quantized {self.quantized}: ZeRO-3 has no formula for such weights")
        check_settings(self)

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def document(self) -> int:
        """Tokens of a document: the keys that its last query sees."""
        return -(-self.seq // self.packing)

    @property
    def element(self) -> int:
        return BYTES[self.dtype]

    @property
    def gradient(self) -> int:
        """Bytes of a number of the gradients of all parameters."""
        return self.element if self.grad_dtype == "same" else BYTES[self.grad_dtype]

    @property
    def buffers(self) -> bool:
        """Whether gradients are summed in buffers of another dtype than the parameters', which stay."""
        return self.training and not self.frozen and self.grad_dtype not in ("same", self.dtype)

    @property
    def training(self) -> bool:
        return self.optimizer != "none"

    @property
    def frozen(self) -> bool:
        """Whether the model's own parameters are frozen, and adapters or virtual tokens are trained."""
        return self.training and bool(self.lora_rank or self.prompt or self.prefix)

    @property
    def named_targets(self) -> tuple[str, ...]:
        return tuple("head" if name == "lm_head" else name for name in self.lora_targets.split(","))

    @property
    def adapts_head(self) -> bool:
        """Whether the projection to the vocabulary has an adapter."""
        return self.training and self.lora_rank > 0 and "head" in self.named_targets

    def own_head(self, shape: Shape) -> bool:
        """Whether a tied model's head becomes a layer of its own, which begins as the embedding's tensor."""
        return shape.tied and (self.untied or self.adapts_head)

    @property
    def devices(self) -> int:
        return self.ranks * self.tp * self.pp

    def share(self, count: int, stage: int) -> int:
        """One rank's part of `count` numbers that ZeRO divides from this stage on: 1 / ranks, rounded up."""
        return -(-count // self.ranks) if self.zero >= stage else count

    def targets(self, shape: Shape) -> tuple[str, ...]:
        """A block's linear layers with an adapter; () without LoRA."""
        if not self.lora_rank or not self.training:
            return ()
        head = ("head",) if shape.family == "llama" else ()  # GPT-2's is always its embedding
        names = tuple(shape.linears) if "all" in self.named_targets else self.named_targets
        for name in (*names, *self.named_targets):
            if name not in (*shape.linears, *head, "all"):
                known = ", ".join((*shape.linears, *head))
                raise UserError(f"--lora-targets: a {shape.family} has no linear layer {name!r}; it has {known}")
        return tuple(name for name in names if name != "head")


@dataclass(frozen=True)
class Term:
    """One row of the table. `formula` gives `bytes` from the symbols of the module's text."""

    name: str
    bytes: int
    formula: str
    source: str
    host: bool = False  # in the host's memory, not the device's

    def on_host(self) -> Term:
        return dataclasses.replace(self, host=True, source="in the host's memory")
