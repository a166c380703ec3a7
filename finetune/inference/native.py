"""A pass over the tokens of a plan as one native call, for a packed Llama on the CPU: all layers, the cache, the choice
of the next token (csrc/cpu/llama_step.cpp). The modules compute the same, one op after another; at batch 1 a token of a
small model then spends more time between products than in them.

With weights in fp32 the result is the modules', to rounding. With others the products' activations are rounded as
ops.quantized_linear rounds those in bf16, and everything between products is fp32, where modules in bf16 round each
result. A token's logits are the same bits in any company, for any split of its prompt and any number of threads.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.inference.scheduler import Asked, Work
from finetune.lm.gpt import GPT
from finetune.lm.layers import RMSNorm
from finetune.lm.llama import Llama
from finetune.ops import _op
from finetune.ops._backends import NATIVE_PROBLEM
from finetune.ops.kv_cache import raw
from finetune.ops.quantized_linear import NUMBER, QuantizedWeight, scale_group

Pool = tuple[Tensor, Tensor | None]  # of keys or values: the blocks, and their scales if they have 8 bits
KINDS = {"tokens": 0, "logits": 1, "states": 2}  # csrc/include/finetune/llama_step.h
PRODUCTS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


def unsupported(model: Llama | GPT, cache_dtype: torch.dtype | None = None) -> str | None:
    """Why the modules must compute this model's passes, in one line; None: one native call does."""
    if NATIVE_PROBLEM:
        return NATIVE_PROBLEM
    if _op.forced not in (None, "cpp"):
        return f"the backend {_op.forced} is forced"
    if not isinstance(model, Llama):
        return f"it computes Llamas and their relatives, not a {type(model).__name__}"
    if model.config.rope_scaling.kind == "dynamic":
        return "with dynamic rope scaling each token has frequencies of its own"
    for name, module in [*model.named_modules(), ("the head", getattr(model, "packed_head", None))]:
        weight = getattr(module, "weight", None) if name != "embed" else getattr(module, "table", None)
        if name in ("embed", "the head") or name.endswith(PRODUCTS):
            if not isinstance(weight, QuantizedWeight):
                return f"{name} is not packed"
            if weight.layout != "cpu" or weight.device.type != "cpu":
                return f"{name} is not packed for the CPU"
    if (cache_dtype or activations(model)) not in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        return f"a cache of {str(cache_dtype or activations(model)).removeprefix('torch.')} is not supported"
    return None


def activations(model: Llama) -> torch.dtype:
    """The dtype in which the modules compute."""
    return model.norm.weight.dtype


class NativeLlama:
    """A packed Llama and the pools of its cache, as the native library holds them. Nothing is copied but norms and
    biases, to fp32; the model must not be given other weights afterwards."""

    def __init__(self, model: Llama, layers: Sequence[Sequence[Pool]], block_size: int) -> None:
        config = model.config
        self.vocabulary = config.vocab_size
        self.tensors: list[Tensor] = []
        self.numbers: list[int] = []
        stored = layers[0][0][0].dtype
        self.numbers += [
            config.layers, config.vocab_size, config.dim, config.heads, config.kv_heads, config.head_dim, config.hidden,
            block_size, config.activation == "gelu_tanh", activations(model) == torch.float32,
            {torch.int8: 1, torch.float8_e4m3fn: 2}.get(stored, 0), stored == torch.bfloat16,
        ]  # fmt: skip
        everywhere, local = (table.on(torch.device("cpu")) for table in (model.rotary, model.local_rotary))
        self.numbers.append(len(everywhere[0]))
        embed: Any = model.embed
        head: Any = model.packed_head
        self.packed(embed.table)
        self.packed(head.weight)
        self.norm(model.norm)
        for index, (block, pools) in enumerate(zip(model.blocks, layers, strict=True)):
            layer: Any = block
            for name in PRODUCTS:
                linear = layer.get_submodule(name)
                self.packed(linear.weight)
                self.optional(None if linear.bias is None else linear.bias.detach())
            self.norm(layer.attn_norm)
            self.norm(layer.mlp_norm)
            for norm in (layer.attn.q_norm, layer.attn.k_norm, layer.attn_post_norm, layer.mlp_post_norm):
                self.optional(factors(norm) if isinstance(norm, RMSNorm) else None)
            self.numbers.append(layer.attn.rotates)
            if layer.attn.rotates:
                self.tensors += [t.contiguous() for t in (local if index in config.window_layers else everywhere)]
            self.numbers.append(layer.attn.window)
            for pool in pools:
                self.tensors += [raw(t) for t in pool if t is not None]
        scale = torch.tensor(config.embedding_scale, dtype=activations(model))  # rounded as the modules round it
        rates = torch.tensor([
            config.norm_eps, config.attention_scale or config.head_dim**-0.5, config.attention_softcap, float(scale),
            config.logit_softcap,
        ])  # fmt: skip
        operators = torch.ops.finetune
        self.handle = operators.llama_model(self.tensors, torch.tensor(self.numbers), rates)
        self.step = operators.llama_step.default
        weakref.finalize(self, operators.llama_free, self.handle)

    def packed(self, weight: QuantizedWeight) -> None:
        self.numbers += [NUMBER[weight.format], scale_group(weight), weight.minimum is not None]
        self.tensors += weight.tensors

    def norm(self, norm: RMSNorm) -> None:
        self.tensors.append(factors(norm))

    def optional(self, vector: Tensor | None) -> None:
        self.numbers.append(vector is not None)
        if vector is not None:
            self.tensors.append(vector.float().contiguous())

    def answers(self, plan: Sequence[Work], asked: Sequence[Asked]) -> list[list[int] | Tensor | None]:
        """As PagedCache.answers, whose blocks are copied already. Logits and states are fp32."""
        tokens, sequences, blocks = array("q"), array("q"), array("i")
        counts = []
        for work, what in zip(plan, asked, strict=True):
            tokens.extend(work.tokens)
            count = {"nothing": 0, "states": work.count}.get(what, 1 + len(work.sequence.guesses))
            counts.append(count)
            sequences.extend((work.start, work.count, len(blocks), count, KINDS.get(what, 0)))
            blocks.extend(work.sequence.table.blocks)
        best, logits, states = self.step(
            self.handle,
            torch.frombuffer(tokens, dtype=torch.int64),
            torch.frombuffer(sequences, dtype=torch.int64).view(-1, 5),
            torch.frombuffer(blocks, dtype=torch.int32),
        )
        results: dict[str, list[int] | Tensor] = {"tokens": best.tolist(), "logits": logits, "states": states}
        at = dict.fromkeys(results, 0)
        found: list[list[int] | Tensor | None] = []
        for what, count in zip(asked, counts, strict=True):
            if what == "nothing":
                found.append(None)
            else:
                found.append(results[what][at[what] : at[what] + count])
                at[what] += count
        return found


def factors(norm: RMSNorm) -> Tensor:
    """(C,) fp32: what the norm multiplies by."""
    weight = norm.weight.detach().float()
    return (weight + 1 if norm.plus_one else weight).contiguous()
