"""The methods that are compared: `KIND_SIZE`, such as lora_8 or prefix_16, or `full`. Each is a few lines over
finetune/peft/lora.py, finetune/peft/virtual_tokens.py and finetune/peft/quantize.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from finetune import memory
from finetune.data.packing import Batch
from finetune.errors import UserError, nearest
from finetune.lm.llama import Llama, LlamaConfig
from finetune.peft import lora
from finetune.peft.quantize import quantize_linears
from finetune.peft.virtual_tokens import Prefix, Prompt

ADAPTERS = ("lora", "rslora", "dora", "pissa")
QUANTIZED: dict[str, Any] = {"nf4": "nf4_double", "int8": "int8"}  # LoRA over weights in this form
VIRTUAL: dict[str, Any] = {"prompt": Prompt, "prefix": Prefix}
MOST = 1 << 16  # rank or virtual tokens
KINDS = (*ADAPTERS, *QUANTIZED, *VIRTUAL)
Forward = Callable[[Batch], Tensor]  # the state after the last norm of each token, (T, C)


@dataclass(frozen=True)
class Method:
    """A kind of fine-tuning and its size."""

    kind: str
    size: int = 0  # rank, or number of virtual tokens

    @property
    def name(self) -> str:
        """As --methods has it."""
        return f"{self.kind}_{self.size}" if self.size else self.kind

    @property
    def exact(self) -> bool:
        """Whether it starts as the base model, to the last bit."""
        return self.kind in ("full", "lora", "rslora", "dora")


def parse(text: str) -> Method:
    """The method of a name. UserError if there is none."""
    kind, _, size = text.partition("_")
    if text == "full":
        return Method("full")
    if kind not in KINDS:
        raise UserError(f"--methods: '{text}' is not a method: they are full, {', '.join(f'{k}_N' for k in KINDS)}"
                        f"{nearest(kind, [*KINDS, 'full'])}")  # fmt: skip
    if not size.isdecimal() or not 1 <= int(size[:9]) <= MOST:
        what = "virtual tokens" if kind in VIRTUAL else "rank"
        raise UserError(f"--methods: '{text}': {kind} needs its {what}, 1 to {MOST}, such as {kind}_8")
    return Method(kind, int(size))


@dataclass
class Adapted:
    """A model with a method on it: the parameters that are trained, by name, and its forward pass."""

    model: Llama
    trained: dict[str, torch.nn.Parameter]
    forward: Forward
    part: Prompt | Prefix | None = None


def adapt(
    method: Method, model: Llama, alpha: float, dropout: float, targets: list[str], text: Tensor,
    generator: torch.Generator,
) -> Adapted:  # fmt: skip
    """Puts the method on the model, in place. Virtual tokens start as the first tokens of `text`."""
    if method.kind == "full":
        model.requires_grad_(True)
        return Adapted(model, dict(model.named_parameters()), lambda batch: plain(model, batch))
    if method.kind in VIRTUAL:
        part = VIRTUAL[method.kind].from_tokens(model.requires_grad_(False), text[: method.size])
        run = prefixed if isinstance(part, Prefix) else prompted
        return Adapted(model, dict(part.named_parameters()), lambda batch: run(part, model, batch), part)
    if method.kind in QUANTIZED:
        quantize_linears(model, QUANTIZED[method.kind])
    lora.apply_lora(model, method.size, alpha, dropout, targets, generator, rslora=method.kind == "rslora",
                    dora=method.kind == "dora", pissa=method.kind == "pissa")  # fmt: skip
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Adapted(model, trained, lambda batch: plain(model, batch))


def plain(model: Llama, batch: Batch) -> Tensor:
    """The state after the last norm (T, C) of a packed batch."""
    return model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens, hidden=True)[0]


def prompted(part: Prompt, model: Llama, batch: Batch) -> Tensor:
    """The same behind a trained prompt."""
    return part(model, batch.tokens, cu_seqlens=batch.cu_seqlens, hidden=True)[0]


def prefixed(part: Prefix, model: Llama, batch: Batch) -> Tensor:
    """The same behind a trained prefix. Packed documents have as many keys as queries: each gets its own row here."""
    lengths = batch.cu_seqlens.diff().long()
    real = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, longest)
    tokens = torch.zeros_like(real, dtype=torch.int64).masked_scatter(real, batch.tokens)
    return part(model, tokens, lengths=lengths, hidden=True)[real]


def layers_of(shape: LlamaConfig, targets: list[str]) -> dict[str, Any]:
    """The linear layers that the targets mean, by name. UserError for a target that means none."""
    with torch.device("meta"):
        layers = lora.linear_layers(Llama(replace(shape, tied=shape.tied and "head" not in targets)))
    for target in targets:
        if not any(lora.fits(target, name) for name in layers):
            raise UserError(f"--targets: '{target}' names no linear layer of the model")
    return {name: layer for name, layer in layers.items() if any(lora.fits(target, name) for target in targets)}


def setup(
    method: Method, batch: Batch, dtype: Literal["fp32", "bf16", "fp16"], shape: LlamaConfig, targets: list[str]
) -> memory.Setup:
    """A step of the method on this batch, for the memory formulas; layers adapted in one block count in all."""
    count, longest = len(batch.cu_seqlens) - 1, int(batch.cu_seqlens.diff().max())
    made = memory.Setup(batch=1, seq=batch.tokens.numel(), dtype=dtype)
    if method.kind == "prompt":
        return replace(made, seq=made.seq + count * method.size, prompt=method.size)
    if method.kind == "prefix":
        return replace(made, batch=count, seq=longest, prefix=method.size)
    if method.kind == "full":
        return made
    adapter: Any = method.kind if method.kind in ("dora", "pissa") else "lora"
    names = ",".join(dict.fromkeys(name.rpartition(".")[2] for name in layers_of(shape, targets)))
    return replace(made, lora_rank=method.size, lora_targets=names, adapter=adapter,
                   quantized=QUANTIZED.get(method.kind, "none"))  # fmt: skip
