"""GGUF files (the container of llama.cpp): weights dequantized in numpy, configuration of a Llama, special tokens.

The container is read here too: gguf's own reader trusts the counts and offsets in a file. Layouts: ggml's
`ggml-common.h` (block_q4_0, block_q4_1, block_q8_0, block_q6_K).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm.io.config import Depth, Size, checked
from finetune.lm.llama import LlamaConfig
from finetune.runs import reading

Array = np.ndarray
T = TypeVar("T")


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
    """32-bit floats."""
    return blocks.copy().view(np.float32)


def f16(blocks: Array) -> Array:
    """16-bit floats."""
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


def dequantize(data: Array, kind: str) -> Array:
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


class Header(msgspec.Struct, rename=lambda name: f"llama.{name}"):
    """What is read of a GGUF's metadata about the shape of the model."""

    block_count: Depth
    context_length: Size
    embedding_length: Size
    feed_forward_length: Size
    head_count: Size = msgspec.field(name="llama.attention.head_count")
    norm_eps: reading.Positive = msgspec.field(name="llama.attention.layer_norm_rms_epsilon")
    head_count_kv: Size | None = msgspec.field(name="llama.attention.head_count_kv", default=None)
    key_length: Size | None = msgspec.field(name="llama.attention.key_length", default=None)
    rope_dimensions: Size | None = msgspec.field(name="llama.rope.dimension_count", default=None)
    rope_theta: reading.Positive = msgspec.field(name="llama.rope.freq_base", default=10000.0)
    expert_count: int = 0


class GGUFModel:
    """An opened file of a Llama. UserError if it is missing, not GGUF, damaged, or of another architecture."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata, self.tensor_infos = read_header(self.path)
        if self.get("split.count", 0) not in (0, 1):
            raise UserError(
                f"{path} is one of {self.get('split.count')} parts of a split model: join them with llama-gguf-split "
                "--merge, and give the whole file"
            )
        self.architecture = self.get("general.architecture")
        if self.architecture != "llama":
            raise UserError(f"{path}: architecture {self.architecture!r} is not supported (only 'llama')")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key (numbers, strings and lists as Python's own)."""
        return self.metadata.get(key, default)

    def struct(self, kind: type[T]) -> T:
        """The metadata as a msgspec.Struct; UserError names a key that is missing, of a wrong type or out of range."""
        return reading.convert(self.metadata, kind, self.path)

    def llama_config(self) -> LlamaConfig:
        if "token_embd.weight" not in self.tensor_infos:
            raise UserError(f"{self.path}: tensor token_embd.weight is missing")
        scaling = self.get("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.tensor_infos:
            raise UserError(f"{self.path}: llama.rope.scaling is not supported")
        if isinstance(self.get("llama.attention.head_count"), list):
            raise UserError(f"{self.path}: llama.attention.head_count that differs by layer is not supported")
        read = self.struct(Header)
        if read.expert_count:
            raise UserError(f"{self.path}: llama.expert_count (mixture of experts) is not supported")
        head_dim = read.key_length or read.embedding_length // read.head_count
        if read.rope_dimensions not in (None, head_dim):
            raise UserError(f"{self.path}: llama.rope.dimension_count other than the head size is not supported")
        return checked(
            LlamaConfig,
            self.path,
            vocab_size=self.tensor_infos["token_embd.weight"].shape[0],
            dim=read.embedding_length,
            layers=read.block_count,
            heads=read.head_count,
            kv_heads=read.head_count_kv or read.head_count,
            hidden=read.feed_forward_length,
            max_length=read.context_length,
            rope_theta=decimal(read.rope_theta),
            norm_eps=decimal(read.norm_eps),
            tied="output.weight" not in self.tensor_infos,
            head_dim=head_dim,
        )

    def __len__(self) -> int:
        return len(self.tensor_infos)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in finetune/lm/llama.py, fp32 tensor) of each weight, dequantized one at a time."""
        for name, info in self.tensor_infos.items():
            if info.kind not in TYPES:
                known = ", ".join(TYPES)
                raise UserError(f"{self.path}: tensor {name} is of GGUF type {info.kind}, which is not supported: "
                                f"convert the file to one of {known}")  # fmt: skip
        config = self.llama_config()
        heads = {"attn.q.weight": config.heads, "attn.k.weight": config.kv_heads}
        raw = np.memmap(self.path, np.uint8, "r")
        for theirs, info in self.tensor_infos.items():
            name = own_name(theirs)
            rows = raw[info.start : info.start + info.nbytes].reshape(*info.shape[:-1], -1)
            values = dequantize(rows, info.kind)
            part = ".".join(name.split(".")[-3:])
            if part in heads:
                if values.ndim != 2 or values.shape[0] % (2 * heads[part]):
                    raise UserError(f"{self.path}: tensor {theirs} has shape {values.shape}, not that of "
                                    f"{heads[part]} heads")  # fmt: skip
                values = unpermute(values, heads[part])
            yield name, torch.from_numpy(np.ascontiguousarray(values))

    def token_ids(self) -> dict[str, int]:
        """bos_token_id, eos_token_id, unk_token_id and pad_token_id, as far as the file names them. A pad that is the
        end token is omitted: masking the padding would mask every end, and a model so trained never stops."""
        found = {f"{key}_token_id": self.token_id(name) for key, name in TOKEN_KEYS.items()}
        if found["pad_token_id"] == found["eos_token_id"]:
            del found["pad_token_id"]
        return {key: value for key, value in found.items() if value is not None}

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: of the text, of the turn, of the message."""
        found = [self.token_id(name) for name in ("eos", "eot", "eom")]
        return list(dict.fromkeys(i for i in found if i is not None))

    def token_id(self, name: str) -> int | None:
        key, count = f"tokenizer.ggml.{name}_token_id", len(self.get("tokenizer.ggml.tokens", []))
        value = self.get(key)
        if value is not None and (not isinstance(value, int) or not 0 <= value < count):
            raise UserError(f"{self.path}: {key} is {value!r}, which is none of the {count} tokens")
        return value


TOKEN_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def decimal(value: float) -> float:
    """The shortest decimal that is this fp32 number: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


# --- The container: header, metadata, what tensors there are (ggml's docs/gguf.md)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is in the file, and how it is stored."""

    kind: str  # ggml's name of the type
    shape: tuple[int, ...]  # rows first, as torch has it
    start: int  # byte of the file
    nbytes: int


SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_HEADER = 1 << 30  # bytes before the weights


class Damaged(ValueError):
    """The file contradicts itself."""


class Bytes:
    """A file's bytes, read one after the other; Damaged beyond their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.at or self.at + count > MOST_HEADER:
            raise Damaged(f"{count} bytes are expected at byte {self.at}, {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth > 4:
            raise Damaged(f"a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            width = struct.calcsize(f"<{SCALARS[inner]}")
            if count > len(self.data):  # a format string of that length would be made first
                raise Damaged(f"a list of {count} values")
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(count * width)))
        if count > len(self.data) - self.at:  # each needs at least one byte
            raise Damaged(f"a list of {count} values")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata and tensors of a GGUF file. UserError if it is missing, not GGUF, cut short, or inconsistent."""
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is not a file")
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse(Bytes(data))
    except Damaged as error:
        raise UserError(f"{path} is a damaged or cut short GGUF file ({error}): fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def parse(data: Bytes) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata and tensors. Damaged if the counts, types or offsets cannot be right."""
    data.take(4)
    version, tensors, pairs = data.number("I"), data.number("Q"), data.number("Q")
    if version not in (2, 3):
        raise Damaged(f"version {version}; 2 and 3 are read")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):  # each needs bytes, so that a wrong count ends at the file's end
        key = data.text()
        metadata[key] = data.value(data.number("I"))
    found = []
    for _ in range(tensors):
        name, dimensions = data.text(), data.number("I")
        if not 1 <= dimensions <= 4:
            raise Damaged(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(data.number("Q") for _ in range(dimensions))[::-1]
        found.append((name, shape, data.number("I"), data.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise Damaged(f"general.alignment is {alignment!r}, not a power of two")
    start = -(-data.at // alignment) * alignment
    return metadata, dict(placed(data, start, alignment, *one) for one in found)


def placed(
    data: Bytes, first: int, alignment: int, name: str, shape: tuple[int, ...], code: int, offset: int
) -> tuple[str, TensorInfo]:
    """A tensor's name and place; Damaged if it is not in the file, or not where its type can be read."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise Damaged(f"tensor {name} is of an unknown type {code}") from None
    weights, width = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % weights:
        raise Damaged(f"tensor {name} of shape {shape} is not made of whole blocks of {weights}")
    if offset % alignment:
        raise Damaged(f"tensor {name} is at offset {offset}, which is not a multiple of {alignment}")
    nbytes, start = math.prod(shape) // weights * width, first + offset
    if start + nbytes > len(data.data):
        raise Damaged(f"tensor {name} ends at byte {start + nbytes}, the file at {len(data.data)}")
    return name, TensorInfo(kind.name, shape, start, nbytes)
