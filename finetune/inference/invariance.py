"""Which models give a request the same bits in any company.

A token's state is the same to the bit, whoever else is in the step, if each of its numbers is a sum of its own inputs
in one fixed order. In the project's norms, rotary embedding, attention and packed products it is. In torch's matrix
product it is not: for another number of rows it takes another kernel, which adds in another order (He and Thinking
Machines Lab 2025, "Defeating Nondeterminism in LLM Inference"). Where two tokens are nearly equally likely an answer
then changes with the load of the server, and the log-probabilities of a rollout are not those of a training step.
`drift.drift` measures it.
"""

from __future__ import annotations

import torch
from torch import nn

from finetune import ops
from finetune.inference.packed import PackedLinear
from finetune.lm.gpt import GPT
from finetune.lm.head import packed_head
from finetune.lm.llama import Llama
from finetune.peft.lora import LoRALinear
from finetune.peft.quantize import FrozenLinear


def dependent(model: Llama | GPT) -> str | None:
    """Why the bits of an answer may depend on the others in the batch; None: they do not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | FrozenLinear | LoRALinear):
            return f"{name} is not packed (finetune.inference.packed.pack)"
    head = packed_head(model)
    if not isinstance(head, PackedLinear):
        return "the output projection is not packed (finetune.inference.packed.pack)"
    if (device := model.norm.weight.device.type) != "cpu":
        return f"the kernels for {device} are not tested for it"
    row = torch.empty(1, head.in_features, dtype=model.norm.weight.dtype)
    return ops.quantized_linear.why_not("cpp", row, head.weight)
