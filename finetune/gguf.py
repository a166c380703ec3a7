"""GGUF files (the llama.cpp container): weights dequantised in numpy, configuration, tokenizer.

The `gguf` package reads the container; what the bytes of a block mean is written out here. Layouts: ggml's
`ggml-common.h` (block_q4_0, block_q4_1, block_q8_0, block_q6_K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.llama import LlamaConfig

if TYPE_CHECKING:
    from finetune.tokenizer import Tokenizer

Array = np.ndarray


def halves(blocks: Array, at: int) -> Array:
    """The fp16 number at byte `at` of every block, as fp32 (N, 1)."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def nibbles(packed: Array) -> Array:
    """(N, 16) bytes → (N, 32): all the low halves first, then all the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def q8_0(blocks: Array) -> Array:
    """34 bytes for 32 weights: fp16 scale d, int8 q[32]; w = q · d."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * halves(blocks, 0)


def q4_0(blocks: Array) -> Array:
    """18 bytes for 32 weights: fp16 scale d, 4-bit q[32]; w = (q − 8) · d."""
    return (nibbles(blocks[:, 2:]).astype(np.float32) - 8) * halves(blocks, 0)


def q4_1(blocks: Array) -> Array:
    """20 bytes for 32 weights: fp16 scale d, fp16 minimum m, 4-bit q[32]; w = q · d + m."""
    return nibbles(blocks[:, 4:]).astype(np.float32) * halves(blocks, 0) + halves(blocks, 2)


def q6_k(blocks: Array) -> Array:
    """210 bytes for 256 weights: low 4 bits ql[128], high 2 bits qh[64], int8 scales[16], fp16 d.

    w = (q − 32) · d · scale of its sixteen. Each half of 128 weights is four runs of 32: run r takes the low (r < 2) or
    high nibbles of ql[32·(r mod 2) …] and bits 2r, 2r+1 of qh.
    """
    count = len(blocks)
    low = blocks[:, :128].reshape(count, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(count, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)
    high = (blocks[:, 128:192].reshape(count, 2, 1, 32) >> shifts) & 3
    q = (low | (high << 4)).astype(np.int8) - 32  # (N, 2, 4, 32)
    scales = halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)  # (N, 16)
    return (scales[:, :, None] * q.reshape(count, 16, 16).astype(np.float32)).reshape(count, 256)


def f32(blocks: Array) -> Array:
    return blocks.copy().view(np.float32)


def f16(blocks: Array) -> Array:
    return blocks.copy().view(np.float16).astype(np.float32)


def bf16(blocks: Array) -> Array:
    """bfloat16 is the upper half of fp32."""
    return (blocks.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)


# Type → (weights in a block, bytes of a block, decoder of (N, bytes) uint8 into (N, weights) fp32).
TYPES: dict[str, tuple[int, int, Callable[[Array], Array]]] = {
    "F32": (1, 4, f32),
    "F16": (1, 2, f16),
    "BF16": (1, 2, bf16),
    "Q8_0": (32, 34, q8_0),
    "Q4_0": (32, 18, q4_0),
    "Q4_1": (32, 20, q4_1),
    "Q6_K": (256, 210, q6_k),
}


def dequantise(data: Array, kind: str) -> Array:
    """The weights, fp32, of `data` (…, bytes of a row) of a ggml type: (…, weights of a row).

    UserError if the type is not one of TYPES; ValueError if a row is not a whole number of blocks.
    """
    if kind not in TYPES:
        raise UserError(f"GGUF type {kind} is not supported: convert the file to one of {', '.join(TYPES)}")
    size, width, decode = TYPES[kind]
    raw = np.ascontiguousarray(data).view(np.uint8)
    if raw.shape[-1] % width:
        raise ValueError(f"a row of {raw.shape[-1]} bytes is not a whole number of {kind} blocks of {width}")
    return decode(raw.reshape(-1, width)).reshape(*raw.shape[:-1], raw.shape[-1] // width * size)


def unpermute(weight: Array, heads: int) -> Array:
    """GGUF stores the rows of q and k for interleaved rotary pairs (x0 with x1); back to halves (x0 with x_{D/2})."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


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
    "attn_output": "attn.o",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}


def own_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `blocks.3.attn.q.weight`; a name that it does not know comes back as it is."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    prefix, layer, part, leaf = ([*name.split("."), "", "", ""])[:4]
    return f"blocks.{layer}.{BLOCK_NAMES[part]}.{leaf}" if prefix == "blk" and part in BLOCK_NAMES else name


class GGUFModel:
    """An opened file of a Llama. UserError if it is missing, no GGUF, damaged, or of another architecture."""

    def __init__(self, path: str | Path) -> None:
        from gguf import GGUFReader

        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path} does not exist")
        if self.path.open("rb").read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        try:
            self.reader = GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
            raise UserError(f"{path} is a damaged or cut short GGUF file ({error}): fetch it again") from None
        self.architecture = self.get("general.architecture")
        if self.architecture != "llama":
            raise UserError(f"{path}: architecture {self.architecture!r} is not supported (only 'llama')")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key (numbers, strings and lists as Python's own)."""
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.path}: metadata key {key} is missing")
        return value

    def llama_config(self) -> LlamaConfig:
        names = {tensor.name: tensor for tensor in self.reader.tensors}
        if "token_embd.weight" not in names:
            raise UserError(f"{self.path}: tensor token_embd.weight is missing")
        if self.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
            raise UserError(f"{self.path}: llama.rope.scaling is not supported")
        if self.get("llama.expert_count", 0):
            raise UserError(f"{self.path}: llama.expert_count (mixture of experts) is not supported")
        heads, dim = self.need("llama.attention.head_count"), self.need("llama.embedding_length")
        if isinstance(heads, list):
            raise UserError(f"{self.path}: llama.attention.head_count that differs by layer is not supported")
        head_dim = self.get("llama.attention.key_length", dim // heads)
        if self.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise UserError(f"{self.path}: llama.rope.dimension_count other than the head size is not supported")
        return LlamaConfig(
            vocab_size=int(names["token_embd.weight"].shape[1]),
            dim=dim,
            layers=self.need("llama.block_count"),
            heads=heads,
            kv_heads=self.get("llama.attention.head_count_kv", heads),
            hidden=self.need("llama.feed_forward_length"),
            max_length=self.need("llama.context_length"),
            rope_theta=decimal(self.get("llama.rope.freq_base", 10000.0)),
            norm_eps=decimal(self.need("llama.attention.layer_norm_rms_epsilon")),
            tied="output.weight" not in names,
            head_dim=head_dim,
        )

    def __len__(self) -> int:
        return len(self.reader.tensors)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in finetune.llama, fp32 tensor) of each weight, dequantised one at a time."""
        heads = self.need("llama.attention.head_count")
        rows = {"attn.q.weight": heads, "attn.k.weight": self.get("llama.attention.head_count_kv", heads)}
        for tensor in self.reader.tensors:
            name = own_name(tensor.name)
            values = dequantise(tensor.data, tensor.tensor_type.name)
            part = ".".join(name.split(".")[-3:])
            if part in rows:
                values = unpermute(values, rows[part])
            yield name, torch.from_numpy(np.ascontiguousarray(values))

    def token_ids(self) -> dict[str, Any]:
        """bos_token_id, eos_token_id and pad_token_id, as far as the file names them. A pad that is the end token is
        left out: masking the padding would then mask every end, and a model so trained never stops."""
        found = {key: self.get(f"tokenizer.ggml.{name}_token_id") for key, name in TOKEN_KEYS.items()}
        if found["pad_token_id"] == found["eos_token_id"]:
            del found["pad_token_id"]
        return {key: value for key, value in found.items() if value is not None}

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE tokenizer that the file describes; UserError for any other kind."""
        from finetune.tokenizer import from_gguf

        return from_gguf(self)


TOKEN_KEYS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def decimal(value: float) -> float:
    """The shortest decimal that is this fp32 number: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))
