"""What keys and values depend on in addition to their tokens: the weights, the dtype of the cache, the adapter. The
prefix cache's keys begin with a hash of it (`blocks.Table.root`), so that a block is found only where it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from finetune.ops.quantized_linear import QuantizedWeight
from finetune.peft.lora import LoRALinear

LOOKS = 16  # numbers that are read of each tensor
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Fingerprint:
    """SHA-256 of a model's configuration, weights and active adapters as they are at the time of a call.

    To hash all of 500 MB takes longer than many an answer. So of each tensor these count: where it is, how often torch
    counted a write to it (training, loading and editing are counted), and on a CPU `LOOKS` of its numbers, against
    writes that torch does not count, to `weight.data`. Weights must not change while requests are in work.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: list[tuple[int, int]] = []  # of each tensor: address, writes
        self.looks: list[np.ndarray] = []  # views

    def __call__(self) -> bytes:
        found = list(tensors(self.model))
        seen = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in found]
        if seen != self.seen:
            self.seen = seen
            self.looks = [some(t) for t in found if t.device.type == "cpu" and t.numel() and t.is_contiguous()]
        switches = [repr(module.active) for module in self.model.modules() if isinstance(module, LoRALinear)]
        words = [repr((getattr(self.model, "config", ""), switches)).encode(), np.array(seen).tobytes()]
        return hashlib.sha256(b" ".join(words + [look.tobytes() for look in self.looks])).digest()


def some(tensor: Tensor) -> np.ndarray:
    """About LOOKS of its numbers, evenly spaced: a view."""
    flat = tensor.detach().view(-1)[:: -(-tensor.numel() // LOOKS)]
    return flat.view(BITS[tensor.element_size()]).numpy()


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """All weights, packed ones too."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor
        for value in module.__dict__.values():
            if isinstance(value, QuantizedWeight):
                yield from value.tensors
