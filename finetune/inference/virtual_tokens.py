"""Trained virtual tokens before a prompt (finetune/peft/virtual_tokens.py), served from blocks like any other tokens.

A sequence with P virtual tokens holds them at positions 0 … P − 1, its prompt follows. They are computed as tokens of
id 0 are, in parts and again after preemption, with one thing replaced: of a prompt their embeddings, of a prefix their
keys and values in each layer. Their content is in the prefix cache's keys, so the next request finds their blocks.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from finetune.errors import UserError
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama
from finetune.peft.virtual_tokens import Prefix, Prompt, keys_and_values


class Virtual:
    """A trained prompt or prefix for requests to `model`. UserError if it is not of this model's shape."""

    def __init__(self, model: Llama | GPT, part: Prompt | Prefix) -> None:
        if not isinstance(model, Llama):
            raise UserError("virtual tokens need a Llama or one of its relatives, not a GPT")
        shape, vectors = model.config, part.vectors.detach()
        width = 2 * shape.layers * shape.kv_heads * shape.head_dim if isinstance(part, Prefix) else shape.dim
        if vectors.shape[1] != width:
            raise UserError(f"the virtual tokens have {vectors.shape[1]} numbers each, this model's have {width}")
        self.count = len(vectors)
        self.embedded: Tensor | None = None  # (P, C) of a prompt
        self.kv: Tensor | None = None  # (layers, 2, P, Hkv, D) of a prefix
        if isinstance(part, Prefix):
            self.kv = keys_and_values(part, model)
        else:
            self.embedded = vectors.to(model.norm.weight)
        words = f"{type(part).__name__} {tuple(vectors.shape)} ".encode()
        self.digest = hashlib.sha256(words + vectors.float().cpu().contiguous().numpy().tobytes()).digest()
