"""Models in GGUF files (the format of llama.cpp): configuration, weights and special tokens.

`ARCHITECTURES` says what each architecture's metadata and tensors mean, as llama.cpp's `src/models/*.cpp` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm.io import gguf_rope
from finetune.lm.io.config import Depth, Size, checked
from finetune.lm.io.gguf_file import Contents, GGUFFile
from finetune.lm.io.gguf_rope import decimal
from finetune.lm.io.gguf_types import Array
from finetune.lm.llama import LlamaConfig
from finetune.runs import reading


@dataclass(frozen=True)
class Architecture:
    """What a GGUF architecture is to finetune/lm/llama.py."""

    about: str
    family: str  # Hugging Face's model_type
    paired: bool = False  # the rows of q and k are stored for interleaved rotary pairs
    qk_norm: bool = False
    nope_every: int = 0  # each layer of this number lacks the rotary embedding
    gemma: bool = False  # norms of weight + 1 after the parts too, scaled embedding, tanh GELU
    pattern: int = 0  # all but each layer of this number have a sliding window
    local_theta: float = 0.0  # rope theta of the window layers, where it is another
    softcaps: tuple[float, float] = (0.0, 0.0)  # of scores and logits, where the file does not say
    rescaled: int = 0  # the number of layers at which scores are divided by √(dim / heads), not by √head_dim


# GGUF's general.architecture → what it means. Others are refused by name.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("Llama 1 to 3.3, Mistral, SmolLM 1 and 2", "llama", paired=True),
    "qwen2": Architecture("Qwen2 and Qwen2.5", "qwen2"),
    "qwen3": Architecture("Qwen3", "qwen3", qk_norm=True),
    "smollm3": Architecture("SmolLM3", "smollm3", paired=True, nope_every=4),
    "gemma2": Architecture("Gemma 2", "gemma2", gemma=True, pattern=2, softcaps=(50.0, 30.0), rescaled=46),
    "gemma3": Architecture(
        "Gemma 3 (text)", "gemma3_text", qk_norm=True, gemma=True, pattern=6, local_theta=10000.0, rescaled=62
    ),
}

TOP_NAMES = {
    "token_embd.weight": "embed.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "attn_output": "attn.o",
    "post_attention_norm": "attn_post_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
    "post_ffw_norm": "mlp_post_norm",
}
OWN_BLOCK_NAMES = {ours: theirs for theirs, ours in BLOCK_NAMES.items()}
OWN_TOP_NAMES = {ours: theirs for theirs, ours in TOP_NAMES.items()}


def own_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `blocks.3.attn.q.weight`; a name that it does not know comes back as it is."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    prefix, layer, part, leaf = ([*name.split("."), "", "", ""])[:4]
    return f"blocks.{layer}.{BLOCK_NAMES[part]}.{leaf}" if prefix == "blk" and part in BLOCK_NAMES else name


def gguf_name(name: str) -> str:
    """The inverse of `own_name`."""
    if name in OWN_TOP_NAMES:
        return OWN_TOP_NAMES[name]
    prefix, layer, part = ([*name.split(".", 2), "", ""])[:3]
    part, _, leaf = part.rpartition(".")
    if prefix != "blocks" or part not in OWN_BLOCK_NAMES or leaf not in ("weight", "bias"):
        raise UserError(f"parameter {name} is not the model's own: merge the adapter before exporting the model")
    return f"blk.{layer}.{OWN_BLOCK_NAMES[part]}.{leaf}"


def permute(weight: Array, heads: int) -> Array:
    """Rows (or entries) of q and k for rotary halves (x0 with x_{D/2}) → for the interleaved pairs (x0 with x1)."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: Array, heads: int) -> Array:
    """The inverse of `permute`."""
    return weight.reshape(heads, len(weight) // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


# Field, key behind the architecture's name, type, default (none: required) of what is read about the model's shape.
HEADER: tuple[tuple[Any, ...], ...] = (
    ("layers", "block_count", Depth),
    ("length", "context_length", Size),
    ("dim", "embedding_length", Size),
    ("hidden", "feed_forward_length", Size),
    ("heads", "attention.head_count", Size),
    ("norm_eps", "attention.layer_norm_rms_epsilon", reading.Positive),
    ("kv_heads", "attention.head_count_kv", Size | None, None),
    ("key_length", "attention.key_length", Size | None, None),
    ("value_length", "attention.value_length", Size | None, None),
    ("rope_dimensions", "rope.dimension_count", Size | None, None),
    ("theta", "rope.freq_base", reading.Positive, 10000.0),
    ("local_theta", "rope.freq_base_swa", reading.Positive | None, None),
    ("window", "attention.sliding_window", int | None, None),
    ("pattern", "attention.sliding_window_pattern", int | list[Any] | None, None),
    ("score_softcap", "attn_logit_softcapping", reading.Positive | None, None),
    ("logit_softcap", "final_logit_softcapping", reading.Positive | None, None),
)
ONLY = {"expert_count": (0,), "attention.causal": (True,)}  # keys whose other values change the model


class GGUFModel(GGUFFile):
    """An opened file of a language model. UserError as GGUFFile's, and for an architecture that is not supported."""

    def __init__(self, path: str | Path, contents: Contents | None = None) -> None:
        super().__init__(path, contents)
        self.name = self.get("general.architecture")
        if not isinstance(self.name, str) or self.name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"{path}: architecture {self.name!r} is not supported (only {known})")
        if self.get("general.type", "model") != "model":
            raise UserError(f"{path} is of the type {self.get('general.type')!r}, not a whole model")
        self.architecture = ARCHITECTURES[self.name]

    def header(self) -> Any:
        """What is read of the metadata about the shape, by the names of HEADER."""
        keys = {field: f"{self.name}.{key}" for field, key, *_ in HEADER}
        for key in keys.values():
            if isinstance(self.get(key), list) and not key.endswith("pattern"):
                raise UserError(f"{self.path}: {key} that differs by layer is not supported")
        for key, values in ONLY.items():
            if (value := self.get(f"{self.name}.{key}", values[0])) not in values:
                raise UserError(f"{self.path}: {self.name}.{key} = {value} is not supported")
        fields = [(field, kind, *default) for field, _, kind, *default in HEADER]
        return self.struct(msgspec.defstruct("Header", fields, rename=keys))

    def llama_config(self) -> LlamaConfig:
        """The shape of the model."""
        if "token_embd.weight" not in self.tensor_infos:
            raise UserError(f"{self.path}: tensor token_embd.weight is missing")
        read, kind = self.header(), self.architecture
        head_dim = read.key_length or read.dim // read.heads
        sizes = {"attention.value_length": read.value_length, "rope.dimension_count": read.rope_dimensions}
        for key, value in sizes.items():
            if value not in (None, head_dim):
                raise UserError(f"{self.path}: {self.name}.{key} other than the head size is not supported")
        theta = decimal(read.theta)
        window, layers = self.windows(read)
        mistral = self.name == "llama" and window
        local = decimal(read.local_theta or kind.local_theta) if layers and kind.local_theta else 0.0
        return checked(
            LlamaConfig,
            self.path,
            vocab_size=self.tensor_infos["token_embd.weight"].shape[0],
            dim=read.dim,
            layers=read.layers,
            heads=read.heads,
            kv_heads=read.kv_heads or read.heads,
            hidden=read.hidden,
            max_length=read.length,
            rope_theta=theta,
            norm_eps=decimal(read.norm_eps),
            tied="output.weight" not in self.tensor_infos,
            head_dim=head_dim,
            family="mistral" if mistral else kind.family,
            rope_scaling=gguf_rope.read(self, self.name, theta, head_dim, read.length),
            qkv_bias=bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & self.tensor_infos.keys()),
            o_bias="blk.0.attn_output.bias" in self.tensor_infos,
            mlp_bias="blk.0.ffn_gate.bias" in self.tensor_infos,
            qk_norm=kind.qk_norm,
            window=window,
            window_layers=layers,
            nope_layers=nope_layers(kind, read.layers),
            activation="gelu_tanh" if kind.gemma else "silu",
            norm_plus_one=kind.gemma,
            post_norms=kind.gemma,
            embedding_scale=read.dim**0.5 if kind.gemma else 1.0,
            attention_scale=attention_scale(kind, read.layers, read.dim, read.heads, head_dim),
            attention_softcap=decimal(read.score_softcap or kind.softcaps[0]) if kind.gemma else 0.0,
            logit_softcap=decimal(read.logit_softcap or kind.softcaps[1]) if kind.gemma else 0.0,
            local_rope_theta=local,
        )

    def windows(self, read: Any) -> tuple[int, tuple[int, ...]]:
        """The sliding window in tokens and the layers that have it; (0, ()) for none."""
        kind, window = self.architecture, read.window
        if window is None and self.name == "gemma2":
            window = 4096
        if not window:
            return 0, ()
        if window < 0:
            raise UserError(f"{self.path}: {self.name}.attention.sliding_window is {window}, not a number of tokens")
        pattern = kind.pattern if read.pattern is None else read.pattern
        if self.name == "llama":  # Mistral 7B v0.1: all layers
            return window, tuple(range(read.layers))
        if not kind.pattern:
            raise UserError(f"{self.path}: {self.name}.attention.sliding_window is not supported")
        if isinstance(pattern, list):
            if len(pattern) < read.layers:
                raise UserError(
                    f"{self.path}: {self.name}.attention.sliding_window_pattern names {len(pattern)} layers"
                )
            return window, tuple(i for i in range(read.layers) if pattern[i])
        return window, window_layers(pattern, read.layers)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in finetune/lm/llama.py, fp32 tensor) of each weight, dequantized one at a time."""
        for name, _, values in self.named(self.tensor):
            yield name, torch.from_numpy(np.ascontiguousarray(values))

    def stored(self) -> Iterator[tuple[str, str, Array]]:
        """(name in finetune/lm/llama.py, GGUF type, rows) of each weight: of a matrix the bytes (N, bytes of a row) as
        the file has them, of a vector the fp32 values."""
        return self.named(lambda name: self.raw(name) if len(self.tensor_infos[name].shape) == 2 else self.tensor(name))

    def named(self, read: Callable[[str], Array]) -> Iterator[tuple[str, str, Array]]:
        """(name in finetune/lm/llama.py, GGUF type, what `read` gives for the file's tensor) of each weight."""
        self.check_types()
        config = self.llama_config()
        for theirs, info in self.tensor_infos.items():
            if theirs == gguf_rope.FREQS and self.name == "llama":
                continue
            for name, values in self.parts(theirs, read(theirs), config):
                yield name, info.kind, values

    def parts(self, theirs: str, values: Array, config: LlamaConfig) -> Iterator[tuple[str, Array]]:
        """The tensors of the model that a tensor of the file holds: one, or q, k and v below each other. Only rows are
        chosen and moved, but for norms: `values` may be the bytes of a matrix."""
        prefix, _, part = theirs.rpartition(".attn_qkv.")
        if prefix:
            sizes = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
            if sum(sizes) != len(values):
                raise UserError(f"{self.path}: tensor {theirs} has {len(values)} rows, not {sum(sizes)}")
            for letter, rows in zip("qkv", np.split(values, np.cumsum(sizes)[:2]), strict=True):
                yield from self.parts(f"{prefix}.attn_{letter}.{part}", rows, config)
            return
        name = own_name(theirs)
        heads = {".attn.q.": config.heads, ".attn.k.": config.kv_heads}.get(name[name.find(".attn.") :][:8])
        if heads and self.architecture.paired:
            if len(values) % (2 * heads):
                raise UserError(f"{self.path}: tensor {theirs} has shape {values.shape}, not that of {heads} heads")
            values = unpermute(values, heads)
        if config.norm_plus_one and name.endswith("norm.weight"):
            values = values - 1
        yield name, values

    def token_ids(self) -> dict[str, int]:
        """bos_token_id, eos_token_id, unk_token_id and pad_token_id, as far as the file names them. A pad that is the
        end token is omitted: masking the padding would mask every end, and a model so trained never stops."""
        found = {f"{key}_token_id": self.token_id(name) for key, name in TOKEN_KEYS.items()}
        if found["pad_token_id"] == found["eos_token_id"]:
            del found["pad_token_id"]
        return {key: value for key, value in found.items() if value is not None}

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: of the text, of the turn, of the message. Where the file does not name the
        second, its text does, as for llama.cpp."""
        found = [self.token_id(name) for name in ("eos", "eot", "eom")]
        if found[1] is None:
            tokens = self.get("tokenizer.ggml.tokens", [])
            found += [tokens.index(end) for end in TURN_ENDS if end in tokens]
        return list(dict.fromkeys(i for i in found if i is not None))

    def token_id(self, name: str) -> int | None:
        key, count = f"tokenizer.ggml.{name}_token_id", len(self.get("tokenizer.ggml.tokens", []))
        value = self.get(key)
        if value is None and self.get("tokenizer.ggml.model") == "llama":  # SentencePiece's own
            value = {"unknown": 0, "bos": 1, "eos": 2}.get(name)
        if value is not None and (not isinstance(value, int) or not 0 <= value < count):
            raise UserError(f"{self.path}: {key} is {value!r}, which is none of the {count} tokens")
        return value


TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")
TOKEN_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def nope_layers(kind: Architecture, layers: int) -> tuple[int, ...]:
    """The layers of an architecture that lack the rotary embedding."""
    return tuple(range(kind.nope_every - 1, layers, kind.nope_every)) if kind.nope_every else ()


def window_layers(pattern: int, layers: int) -> tuple[int, ...]:
    """All layers but each `pattern`-th; 0: all."""
    return tuple(i for i in range(layers) if pattern == 0 or i % pattern < pattern - 1)


def attention_scale(kind: Architecture, layers: int, dim: int, heads: int, head_dim: int) -> float:
    """What Gemma's scores are multiplied by (llama.cpp knows its largest model by the layers); 0 for others."""
    return (dim // heads if kind.rescaled == layers else head_dim) ** -0.5 if kind.gemma else 0.0
