"""Llama (Touvron et al. 2023, arXiv:2302.13971; grouped-query attention from arXiv:2307.09288) on the project's ops.

Reads Hugging Face safetensors folders, GGUF files and hub ids; writes folders that transformers opens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune import ops
from finetune.errors import UserError
from finetune.lm.io import weights
from finetune.lm.layers import Cache, Context, RMSNorm, RotaryTable, embedding, init_gpt2, prepare
from finetune.runs import reading

if TYPE_CHECKING:
    from finetune.lm.tokenizer import Tokenizer


C = TypeVar("C")


@dataclass
class LlamaConfig:
    """Shape of a Llama. `head_dim` 0 means dim / heads."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    max_length: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    head_dim: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "hidden", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"a Llama needs {name} of at least 1, not {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise UserError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if not self.head_dim:
            if self.dim % self.heads:
                raise UserError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
            self.head_dim = self.dim // self.heads
        if self.head_dim % 2:
            raise UserError(f"rotary embedding needs an even head size, not {self.head_dim}")


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        rows, steps, _ = x.shape
        q, k, v = (part(x).view(rows, steps, -1, self.head_dim) for part in (self.q, self.k, self.v))  # (B, T, H, D)
        o = context.attend(self.layer, context.rotate(q), context.rotate(k), v)
        return self.o(o.reshape(rows, steps, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn(self.attn_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """`gradient_checkpointing = True` keeps only each block's input for the backward pass and computes the rest again.

    `token_ids` holds bos_token_id, eos_token_id and pad_token_id where the source names them, `generation_ids` those
    of its generation_config.json where they differ; an eos_token_id may be a list.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.token_ids: dict[str, Any] = {}
        self.generation_ids: dict[str, Any] = {}
        self.embed = embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config.head_dim, config.max_length, config.rope_theta)
        if self.embed.weight.device.type != "meta":
            init_gpt2(self, config.layers, residual=("attn.o", "mlp.down"))

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the output projection; the embedding itself where the two are tied."""
        return self.embed.weight if self.config.tied else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        embedded: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), or with `hidden` the state after the last norm (B, T, C).

        `lengths` (B,): rows are padded on the right and only the first lengths[b] tokens are real.
        `cu_seqlens` (N+1,): documents packed into one row; each sees only itself, positions start again with each.
        `cache`: keys and values of earlier calls are used and these tokens' are added.
        `embedded` (B, T, C): vectors in the place of the tokens' embeddings.
        UserError: a token outside the vocabulary, a position beyond the maximum length, contradictory arguments.
        """
        config = self.config
        context = prepare(
            tokens,
            vocab_size=config.vocab_size,
            max_length=config.max_length,
            positions=positions,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            cache=cache,
        )
        context.rotary = self.rotary.on(tokens.device)
        x = self.embed(tokens) if embedded is None else embedded  # (B, T, C)
        save_memory = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            x = checkpoint(block, x, context, use_reentrant=False) if save_memory else block(x, context)
        if cache is not None:
            cache.advance(tokens.shape[1], lengths)
        x = self.norm(x)
        return x if hidden else F.linear(x, self.head_weight)

    @classmethod
    def assemble(
        cls, config: LlamaConfig, pairs: Iterable[tuple[str, Tensor]], dtype: torch.dtype, source: object
    ) -> Llama:
        """A model of the tensors `pairs`, named as in this file; no second copy of the weights is made."""
        with torch.device("meta"):
            model = cls(config)
        weights.fill(model, pairs, dtype, source)
        return model

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
        """Loads a Hugging Face safetensors folder, a .gguf file, the name `smollm2`, or a hub id.

        UserError names what is missing, damaged, or not supported (rope scaling, biases, …).
        """
        from finetune.lm.io import hub

        source = hub.resolve(path)
        if source.suffix == ".gguf":
            from finetune.lm.io.gguf import GGUFModel

            file = GGUFModel(source)
            model = cls.assemble(file.llama_config(), file.tensors(), dtype, source)
            model.token_ids = {key: value for key, value in file.token_ids().items() if key in TOKEN_IDS}
            if len(stops := file.stop_ids()) > 1:
                model.generation_ids = model.token_ids | {"eos_token_id": stops}
            return model
        raw = read_raw(source)
        config = read_config(raw, source / "config.json")
        model = cls.assemble(config, own_names(weights.read_safetensors(source), config), dtype, source)
        model.token_ids, model.generation_ids = read_token_ids(source, raw)
        return model

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes a folder that transformers.AutoModelForCausalLM.from_pretrained opens, in the parameters' dtype;
        with `tokenizer` its files too. The model's own token ids go before the tokenizer's: they may be lists."""
        ids = (tokenizer.token_ids() if tokenizer else {}) | self.token_ids
        config = write_config(self.config, self.embed.weight.dtype) | ids
        names = ((to_hf(name), parameter) for name, parameter in self.named_parameters())
        extra = tokenizer.save_pretrained if tokenizer else None
        weights.write_model(folder, names, config, {"_from_model_config": True, **ids, **self.generation_ids}, extra)


def config_of(path: str | Path) -> LlamaConfig:
    """The shape of a Llama that `from_pretrained` would load, without its weights."""
    from finetune.lm import presets
    from finetune.lm.io import hub

    if str(path) == "smollm2" and not Path("smollm2").exists():
        return LlamaConfig(**presets.LLAMA["smollm2-135m"])
    source = hub.resolve(path)
    if source.suffix == ".gguf":
        from finetune.lm.io.gguf import GGUFModel

        return GGUFModel(source).llama_config()
    return read_config(read_raw(source), source / "config.json")


def read_raw(source: Path) -> dict[str, Any]:
    """config.json of a model folder; UserError for the folder of an adapter, which is no model by itself."""
    if not (source / "config.json").exists() and (source / "adapter_config.json").exists():
        from finetune.peft.adapters import base_of

        raise UserError(
            f"{source} is an adapter, not a model: give its base model ({base_of(source) or 'which it does not name'})"
        )
    return weights.read_json(source / "config.json")


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# This file's name → the name in Hugging Face's Llama, by part.
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
OWN_NAMES = {theirs: ours for ours, theirs in HF_NAMES.items()}
TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
OWN_TOP_NAMES = {theirs: ours for ours, theirs in TOP_NAMES.items()}


def to_hf(name: str) -> str:
    """`blocks.3.attn.q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    prefix, layer, part = ([*name.split(".", 2), "", ""])[:3]
    part, _, leaf = part.rpartition(".")
    if prefix != "blocks" or part not in HF_NAMES or leaf != "weight":
        raise UserError(f"parameter {name} is not a Llama's own: merge the adapter before saving the model")
    return f"model.layers.{layer}.{HF_NAMES[part]}.{leaf}"


def from_hf(name: str) -> str:
    """The inverse of `to_hf`; a name that it does not know comes back as it is."""
    if name in OWN_TOP_NAMES:
        return OWN_TOP_NAMES[name]
    prefix, layer, part = ([*name.removeprefix("model.").split(".", 2), "", ""])[:3]
    part, _, leaf = part.rpartition(".")
    return f"blocks.{layer}.{OWN_NAMES[part]}.{leaf}" if prefix == "layers" and part in OWN_NAMES else name


def own_names(pairs: Iterable[tuple[str, Tensor]], config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in pairs:
        # Old folders carry the rotary frequencies, and some tied ones the embedding a second time.
        if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
            continue
        yield from_hf(name), tensor


def read_config(raw: dict[str, Any], source: object) -> LlamaConfig:
    """LlamaConfig of a Hugging Face config.json. Dropout is a setting of training and is left out; everything else
    that would change the result and is not supported is a UserError."""
    weights.require(
        raw,
        source,
        {
            "model_type": ("llama",),
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "sliding_window": (None,),
            "quantization_config": (None,),
            "partial_rotary_factor": (1.0, None),
            "rope_interleaved": (False,),
        },
    )
    if "model_type" not in raw:
        raise UserError(f"{source}: model_type is missing (only 'llama' is supported)")
    read = reading.convert(raw, HFConfig, source)
    theta = read.rope_theta
    for key in ("rope_scaling", "rope_parameters"):  # the second name since transformers 5, with theta inside
        scaling = raw.get(key) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise UserError(f"{source}: {key} of type {kind!r} is not supported (only 'default')")
        weights.require(scaling, f"{source}: {key}", {"partial_rotary_factor": (1.0, None)})
        theta = reading.convert(scaling.get("rope_theta", theta), reading.Positive, f"{source}: {key}.rope_theta")
    return checked(
        LlamaConfig,
        source,
        **{ours: getattr(read, key) for key, ours in NUMBERS.items()},
        kv_heads=read.num_key_value_heads or read.num_attention_heads,
        rope_theta=theta,
        norm_eps=read.rms_norm_eps,
        tied=read.tie_word_embeddings,
        head_dim=read.head_dim or 0,
    )


def checked(kind: type[C], source: object, **sizes: Any) -> C:
    """A LlamaConfig or GPTConfig; UserError names the file whose sizes do not go together."""
    try:
        return kind(**sizes)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


# Far above every published model: a number beyond is a mistake, and building the model would take hours or all memory.
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 26)]
Depth = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]


class HFConfig(msgspec.Struct):
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    max_position_embeddings: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rope_theta: reading.Positive = 10000.0
    rms_norm_eps: reading.Positive = 1e-6
    tie_word_embeddings: bool = False
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


class TokenIds(msgspec.Struct):
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None  # -1 in old folders: none


def read_token_ids(source: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The special ids of config.json, and those of generation_config.json where there is one that names any."""
    found = []
    file = source / "generation_config.json"
    for where, value in ((source / "config.json", raw), (file, weights.read_json(file) if file.exists() else {})):
        ids = msgspec.structs.asdict(reading.convert(value, TokenIds, where))
        found.append({key: one for key, one in ids.items() if one not in (None, -1)})
    return found[0], found[1]


NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_length",
}


def write_config(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, ours) for key, ours in NUMBERS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
