"""What keys and values depend on in addition to their tokens: the weights, the dtype of the cache, the adapter. The
prefix cache's keys begin with a hash of it (`blocks.Table.root`), so that a block is found only where it is right."""

from __future__ import annotations

import hashlib
from array import array

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
        self.seen = b""  # of each tensor: address and writes
        self.looks: list[np.ndarray] = []  # views

    def __call__(self) -> bytes:
        found, switches = state(self.model)
        seen = array("q", [n for t in found for n in (t.data_ptr(), 0 if t.is_inference() else t._version)]).tobytes()
        if seen != self.seen:
            self.seen = seen
            self.looks = [some(t) for t in found if t.device.type == "cpu" and t.numel() and t.is_contiguous()]
        words = repr((getattr(self.model, "config", ""), switches)).encode()
        return hashlib.sha256(b" ".join([words, seen, *(look.tobytes() for look in self.looks)])).digest()


def some(tensor: Tensor) -> np.ndarray:
    """About LOOKS of its numbers, evenly spaced: a view."""
    flat = tensor.detach().view(-1)[:: -(-tensor.numel() // LOOKS)]
    return flat.view(BITS[tensor.element_size()]).numpy()


def state(model: nn.Module) -> tuple[list[Tensor], list[dict[str, float]]]:
    """All weights, packed ones too, and which adapters are active. Called for each request, so it reads the modules'
    dictionaries."""
    found: list[Tensor] = []
    switches: list[dict[str, float]] = []
    left = [model]
    while left:
        module = left.pop()
        own = module.__dict__
        for tensors in (own["_parameters"], own["_buffers"]):
            if tensors:
                found += [tensor for tensor in tensors.values() if tensor is not None]
        for value in own.values():
            if type(value) is QuantizedWeight:
                found += value.tensors
        if type(module) is LoRALinear:
            switches.append(module.active)
        left += [child for child in own["_modules"].values() if child is not None]
    return found, switches
