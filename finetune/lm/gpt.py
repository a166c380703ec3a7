"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, GELU, tied head; on the project's ops.

Reads and writes Hugging Face's GPT-2 folders, whose linear layers are stored transposed (Conv1D).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune import ops
from finetune.errors import UserError
from finetune.lm.io import weights
from finetune.lm.layers import Cache, Context, LayerNorm, embedding, init_gpt2, prepare
from finetune.lm.llama import Depth, Size, checked, read_raw, read_token_ids
from finetune.runs import reading

if TYPE_CHECKING:
    from finetune.lm.tokenizer import Tokenizer


@dataclass
class GPTConfig:
    """Shape of a GPT-2. `hidden` 0 means 4 · dim."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    max_length: int = 1024
    hidden: int = 0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"a GPT-2 needs {name} of at least 1, not {getattr(self, name)}")
        if self.dim % self.heads:
            raise UserError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        self.hidden = self.hidden or 4 * self.dim

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.o = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        rows, steps, dim = x.shape
        q, k, v = self.qkv(x).view(rows, steps, 3, self.heads, -1).unbind(2)  # (B, T, H, D)
        return self.o(context.attend(self.layer, q, k, v).reshape(rows, steps, dim))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.hidden)
        self.down = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn(self.attn_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """`gradient_checkpointing = True` keeps only each block's input for the backward pass and computes the rest again.

    There is no dropout. `token_ids` and `generation_ids` are those of `finetune.llama.Llama`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.token_ids: dict[str, Any] = {}
        self.generation_ids: dict[str, Any] = {}
        self.embed = embedding(config.vocab_size, config.dim)
        self.positions = embedding(config.max_length, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = LayerNorm(config.dim, config.norm_eps)
        if self.embed.weight.device.type != "meta":
            init_gpt2(self, config.layers, residual=("attn.o", "mlp.down"))

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the output projection, which is the embedding itself."""
        return self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), or with `hidden` the state after the last norm (B, T, C).

        The arguments and errors are those of `Llama.forward`.
        """
        context = prepare(
            tokens,
            vocab_size=self.config.vocab_size,
            max_length=self.config.max_length,
            positions=positions,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            cache=cache,
        )
        x = self.embed(tokens) + self.positions(context.positions)  # (B, T, C)
        save_memory = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            x = checkpoint(block, x, context, use_reentrant=False) if save_memory else block(x, context)
        if cache is not None:
            cache.advance(tokens.shape[1], lengths)
        x = self.norm(x)
        return x if hidden else F.linear(x, self.head_weight)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> GPT:
        """Loads a Hugging Face GPT-2 folder (safetensors) or hub id. UserError names what is wrong or not supported."""
        from finetune.lm.io import hub

        source = hub.resolve(path)
        if source.suffix == ".gguf":
            raise UserError(f"{source}: GPT-2 is read from a safetensors folder, not from GGUF")
        raw = read_raw(source)
        with torch.device("meta"):
            model = cls(read_config(raw, source / "config.json"))
        weights.fill(model, own_names(weights.read_safetensors(source)), dtype, source)
        model.token_ids, model.generation_ids = read_token_ids(source, raw)
        return model

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes a folder that transformers.AutoModelForCausalLM.from_pretrained opens, in the parameters' dtype;
        with `tokenizer` its files too."""
        ids = (tokenizer.token_ids() if tokenizer else {}) | self.token_ids
        ids = {"bos_token_id": None, "eos_token_id": None} | ids  # GPT2Config would fill in 50256
        config = write_config(self.config, self.embed.weight.dtype) | ids
        names = (
            (to_hf(name), parameter.t() if transposed(name) else parameter)
            for name, parameter in self.named_parameters()
        )
        extra = tokenizer.save_pretrained if tokenizer else None
        weights.write_model(folder, names, config, {"_from_model_config": True, **ids, **self.generation_ids}, extra)


HF_NAMES = {
    "attn_norm": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.o": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
OWN_NAMES = {theirs: ours for ours, theirs in HF_NAMES.items()}
TOP_NAMES = {"embed": "wte", "positions": "wpe", "norm": "ln_f"}
OWN_TOP_NAMES = {theirs: ours for ours, theirs in TOP_NAMES.items()}


def transposed(name: str) -> bool:
    """Whether Hugging Face stores this tensor as (in, out): the blocks' linear layers."""
    return name.endswith(".weight") and name.startswith("blocks.") and "norm" not in name


def to_hf(name: str) -> str:
    """`blocks.3.attn.qkv.weight` → `transformer.h.3.attn.c_attn.weight`."""
    part, leaf = name.rsplit(".", 1)
    if part in TOP_NAMES:
        return f"transformer.{TOP_NAMES[part]}.{leaf}"
    prefix, layer, part = ([*part.split(".", 2), "", ""])[:3]
    if prefix != "blocks" or part not in HF_NAMES or leaf not in ("weight", "bias"):
        raise UserError(f"parameter {name} is not a GPT-2's own: merge the adapter before saving the model")
    return f"transformer.h.{layer}.{HF_NAMES[part]}.{leaf}"


def from_hf(name: str) -> str:
    """The inverse of `to_hf`, with or without `transformer.`; a name that it does not know comes back as it is."""
    part, _, leaf = name.removeprefix("transformer.").rpartition(".")
    if part in OWN_TOP_NAMES:
        return f"{OWN_TOP_NAMES[part]}.{leaf}"
    prefix, layer, part = ([*part.split(".", 2), "", ""])[:3]
    return f"blocks.{layer}.{OWN_NAMES[part]}.{leaf}" if prefix == "h" and part in OWN_NAMES else name


def own_names(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for theirs, tensor in pairs:
        # The causal mask of old folders, and the tied head where it is stored a second time.
        if theirs.endswith((".attn.bias", ".attn.masked_bias")) or theirs == "lm_head.weight":
            continue
        name = from_hf(theirs)
        yield name, tensor.t() if transposed(name) else tensor


def read_config(raw: dict[str, Any], source: object) -> GPTConfig:
    """GPTConfig of a Hugging Face config.json. Dropout is a setting of training and is left out; everything else that
    would change the result and is not supported is a UserError."""
    weights.require(
        raw,
        source,
        {
            "model_type": ("gpt2",),
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "tie_word_embeddings": (True,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
            "quantization_config": (None,),
        },
    )
    if "model_type" not in raw:
        raise UserError(f"{source}: model_type is missing (only 'gpt2' is supported)")
    read = reading.convert(raw, HFConfig, source)
    return checked(
        GPTConfig,
        source,
        **{ours: getattr(read, key) for key, ours in NUMBERS.items()},
        hidden=read.n_inner or 0,
        norm_eps=read.layer_norm_epsilon,
    )


class HFConfig(msgspec.Struct):
    vocab_size: Size
    n_embd: Size
    n_layer: Depth
    n_head: Size
    n_positions: Size
    n_inner: Size | None = None
    layer_norm_epsilon: reading.Positive = 1e-5


NUMBERS = {
    "vocab_size": "vocab_size",
    "n_embd": "dim",
    "n_layer": "layers",
    "n_head": "heads",
    "n_positions": "max_length",
}


def write_config(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{key: getattr(config, ours) for key, ours in NUMBERS.items()},
        "n_inner": config.hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": 0.02,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
