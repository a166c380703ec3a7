"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = x Wᵀ + s (x Aᵀ) Bᵀ with W frozen, A (r, in), B (out, r), s = alpha / r.

A and B are fp32 whatever the dtype of W, and the two terms are summed in fp32 before the result is rounded: a bf16
adapter would swallow its own first updates. Adapter folders are in peft's format, both ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune import weights
from finetune.checkpoint import atomic_write
from finetune.errors import UserError, nearest
from finetune.llama import from_hf, to_hf

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # all linear layers of a Llama's blocks
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before a Hugging Face name


class LoRAFunction(torch.autograd.Function):
    """The two products and their sum, saving x and x Aᵀ only (autograd would also keep what it adds).

    With g the gradient of y and h = s · g B:   dx = g W + h A,   dA = hᵀ x,   dB = s · gᵀ (x Aᵀ).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        low = rows.to(a.dtype) @ a.T  # (N, r)
        y = F.linear(rows, weight).to(a.dtype).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])  # (N, out)
        wide, rows = g.to(a.dtype), x.reshape(-1, x.shape[-1])
        h = (wide @ b).mul_(ctx.scale)  # (N, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight).to(a.dtype).addmm_(h, a).to(x.dtype).view(x.shape)
        da = h.T @ rows.to(a.dtype) if ctx.needs_input_grad[2] else None
        db = (wide.T @ low).mul_(ctx.scale) if ctx.needs_input_grad[3] else None
        return dx, None, da, db, None


class LoRALinear(nn.Module):
    """A frozen linear layer `base` without bias, and its adapter. B starts at 0, so the layer starts as `base`.

    A is uniform in ±1/√in, as peft's and torch's own linear layers. Dropout is on the adapter's input only.
    """

    base: nn.Linear
    rank: int
    scale: float
    dropout: float
    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if base.bias is not None:
            raise ValueError("LoRALinear adapts linear layers without a bias")
        self.base, self.rank, self.scale, self.dropout = base.requires_grad_(False), rank, alpha / rank, dropout
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        if device.type != "meta":
            with torch.no_grad():
                self.lora_A.uniform_(-1, 1, generator=generator).div_(math.sqrt(base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), in x's dtype."""
        if self.dropout and self.training:
            low = F.linear(F.dropout(x, self.dropout).float(), self.lora_A)
            return (self.base(x).float() + self.scale * F.linear(low, self.lora_B)).to(x.dtype)
        return LoRAFunction.apply(x, self.base.weight, self.lora_A, self.lora_B, self.scale)

    def merged(self) -> nn.Linear:
        """A plain layer of W + s B A, summed in fp32."""
        total = self.base.weight.float().addmm(self.lora_B, self.lora_A, alpha=self.scale)
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = self.base.in_features, self.base.out_features
        linear.weight = nn.Parameter(total.to(self.base.weight.dtype).detach())
        return linear


def apply_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Freezes `model` and gives an adapter to every linear layer whose name ends in one of `targets`; the adapters'
    parameters. UserError for a target that names no layer, or if there are adapters already."""
    if rank < 1:
        raise UserError(f"LoRA's rank must be at least 1, not {rank}")
    if not 0 <= dropout < 1:
        raise UserError(f"LoRA's dropout must be in [0, 1), not {dropout}")
    if next(adapters(model), None):
        raise UserError("the model has adapters already: merge them first")
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and endings(name) & {*targets}}
    known = {ending for name, m in model.named_modules() if isinstance(m, nn.Linear) for ending in endings(name)}
    for target in targets:
        if target not in known:
            raise UserError(f"LoRA target '{target}' names no linear layer{nearest(target, known)}")
    model.requires_grad_(False)
    for name, linear in found.items():
        set_module(model, name, LoRALinear(linear, rank, alpha, dropout, generator))
    return [p for _, layer in adapters(model) for p in (layer.lora_A, layer.lora_B)]


def endings(name: str) -> set[str]:
    """`blocks.0.attn.q` → {`q`, `attn.q`, `0.attn.q`, `blocks.0.attn.q`}."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every adapted layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def merge(model: nn.Module) -> None:
    """Adds every adapter to its weight, in place, and removes it: the model is a plain one again."""
    for name, layer in list(adapters(model)):
        set_module(model, name, layer.merged())


def save_adapter(model: nn.Module, folder: str | Path, base: str = "") -> None:
    """Writes a Llama's adapter as peft.PeftModel.from_pretrained opens it. `base`: where the base model is found."""
    layers = dict(adapters(model))
    if not layers:
        raise UserError("the model has no adapter to save")
    first = next(iter(layers.values()))
    plain = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.scale * first.rank,
        "lora_dropout": first.dropout,
        "target_modules": sorted(shortest(set(layers), plain)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    tensors = {
        f"{PREFIX}{hf_module(name)}.lora_{part}.weight": getattr(layer, f"lora_{part}").detach().cpu().contiguous()
        for name, layer in layers.items()
        for part in "AB"
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / TENSORS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        weights.write_json(folder / CONFIG, config)
    except OSError as error:
        raise UserError(f"cannot write the adapter to {folder}: {error}") from None


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Puts the LoRA adapter of a peft folder on a Llama, frozen otherwise. UserError names what is missing, damaged,
    of another model, or a variant that is not supported."""
    folder = Path(folder)
    config = weights.read_json(folder / CONFIG)
    weights.require(config, folder / CONFIG, UNSUPPORTED)
    rank = weights.take(config, folder / CONFIG, "r", int)
    alpha = weights.take(config, folder / CONFIG, "lora_alpha", float)
    if config.get("use_rslora"):  # alpha / √r instead of alpha / r (Kalajdzievski 2023, arXiv:2312.03732)
        alpha *= math.sqrt(rank)
    tensors = {adapted(name, folder): tensor for name, tensor in weights.read_safetensors(folder, TENSORS)}
    targets = sorted({name for name, _ in tensors})
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in targets:
        if name not in linear:
            raise UserError(f"{folder}: the adapter is for a layer {name}, which this model has not")
    apply_lora(model, rank, alpha, float(config.get("lora_dropout") or 0.0), targets)
    for name, layer in adapters(model):
        for part in "AB":
            mine, given = getattr(layer, f"lora_{part}"), tensors.get((name, part))
            if given is None or given.shape != mine.shape:
                shape = "missing" if given is None else f"{tuple(given.shape)} instead of {tuple(mine.shape)}"
                raise UserError(f"{folder}: lora_{part} of {name} is {shape}: is it an adapter of this model?")
            mine.data.copy_(given)


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


def shortest(adapted: set[str], plain: set[str]) -> set[str]:
    """Hugging Face names of the adapted layers: `q_proj` if every layer of that name is adapted, else whole names."""
    partly = {name.rsplit(".", 1)[1] for name in plain}
    return {
        whole if name.rsplit(".", 1)[1] in partly else whole.rsplit(".", 1)[1]
        for name, whole in ((name, hf_module(name)) for name in adapted)
    }


def hf_module(name: str) -> str:
    """`blocks.3.attn.q` → `model.layers.3.self_attn.q_proj`."""
    return to_hf(f"{name}.weight").removesuffix(".weight")


def adapted(name: str, folder: Path) -> tuple[str, str]:
    """`base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` → (`blocks.3.attn.q`, `A`)."""
    match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
    if not match:
        raise UserError(f"{folder}: tensor {name} is not one of a LoRA adapter")
    return from_hf(f"{match[1]}.weight").removesuffix(".weight"), match[2]
