"""AdamW over ops.adamw_ and ops.adamw8bit_, and learning-rate schedules as plain functions.

optimizer = AdamW(decay_groups(model.parameters(), 0.1), lr=1e-3)
for step in range(total):
    loss.backward()
    norm = ops.clip_grad_norm_([p.grad for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step(lr=cosine(step, total, warmup=20, peak=1e-3))
    optimizer.zero_grad()
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune import ops
from finetune.ops.adamw8bit import states_like

# Form of the moments → the operator, and the names of its states in the order of its arguments.
MOMENTS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "fp32": (ops.adamw_, ("exp_avg", "exp_avg_sq")),
    "8bit": (ops.adamw8bit_, ("exp_avg", "exp_avg_max", "exp_avg_sq", "exp_avg_sq_max")),
}


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with fp32 or 8-bit moments, and fp32 masters for parameters of fewer bits.

    params: parameters, or groups of them as in torch.optim; a group may set any of the hyperparameters.
    master: "auto" keeps an fp32 copy of each bfloat16 parameter, updates that and rounds it to the parameter;
    False updates the parameter itself (which then loses updates below half its last bit).
    moments: "fp32", or "8bit": a byte each and 8 bytes for every 256 elements (arXiv:2110.02861, ops.adamw8bit_).

    State of a parameter: step (int), exp_avg, exp_avg_sq (fp32, or uint8 codes with the fp32 exp_avg_max and
    exp_avg_sq_max) and, if kept, master (fp32). `state_dict()` contains only tensors, numbers, strings, lists and
    dicts, and loading it restores every bit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        master: Literal["auto", False] = "auto",
        moments: Literal["fp32", "8bit"] = "fp32",
    ) -> None:
        for name, value, holds in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("master", master, master in ("auto", False)),
            ("moments", moments, moments in MOMENTS),
        ):
            if not holds:
                raise ValueError(f"AdamW: {name}={value!r} is out of range")
        defaults = {"lr": lr, "betas": list(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"master": master, "moments": moments})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, lr: float | None = None, grad_scale: float | Tensor = 1.0
    ) -> Any:
        """Updates every parameter that has a gradient.

        lr: sets the learning rate of all groups first. grad_scale: a number or 0-d fp32 tensor that multiplies the
        gradients, which stay as they are (clipping without another sweep).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if lr is not None:
                group["lr"] = lr
            # One call for all tensors of one dtype and age: a parameter without a gradient is skipped and ages later.
            alike: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p] or self._begin(p, group)
                    state["step"] += 1
                    moments = "8bit" if "exp_avg_max" in state else "fp32"
                    alike[p.dtype, p.device, "master" in state, moments, state["step"]].append(p)
            beta1, beta2 = group["betas"]
            for (_, _, has_master, moments, step), params in alike.items():
                states = [self.state[p] for p in params]
                update, names = MOMENTS[moments]
                update(
                    params,
                    [p.grad for p in params if p.grad is not None],
                    *([s[name] for s in states] for name in names),
                    [s["master"] for s in states] if has_master else None,
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step,
                    grad_scale=grad_scale,
                )
        return loss

    def _begin(self, p: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError("AdamW: gradients must be dense")
        state = self.state[p]
        state["step"] = 0
        if group["moments"] == "8bit":
            state |= states_like(p)
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
        if group["master"] == "auto" and p.dtype != torch.float32:
            state["master"] = p.detach().to(torch.float32, copy=True)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores every bit. Keys of `state` may be numbers or, as JSON leaves them, their text."""
        state_dict = {**state_dict, "state": {int(k): v for k, v in state_dict["state"].items()}}
        super().load_state_dict(state_dict)
        # torch casts the moments of a bfloat16 parameter to bfloat16 on the way: put the originals back.
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(ids, params, strict=True):
            if saved := state_dict["state"].get(i):
                self.state[p] = {
                    k: v.detach().to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.items()
                }
                self.state[p]["step"] = int(saved["step"])


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of the optimizer's own parameters; other parameters in the loss's graph get no gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = g
    optimizer.step()


def decay_groups(params: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups that decay matrices (two dimensions or more) and spare vectors: norms and biases.

    Parameters that need no gradient are omitted.
    """
    wanted = [p for p in params if p.requires_grad]
    groups = [
        {"params": [p for p in wanted if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in wanted if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# --- Schedules: the learning rate of step 0, 1, … total - 1. `warmup` steps rise linearly to the peak, the last of
# --- them reaches it; the rest falls from the peak towards the floor, which step `total` would reach.


def constant(step: int, total: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """The peak after the warmup. `total` and `floor` are unused: all schedules have one signature."""
    return peak * min(1.0, (step + 1) / warmup) if warmup else peak


def linear(step: int, total: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """A straight line from the peak to the floor."""
    if step < warmup:
        return constant(step, total, warmup, peak)
    return peak + (floor - peak) * _progress(step, total, warmup)


def cosine(step: int, total: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Half a period of a cosine from the peak to the floor (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    if step < warmup:
        return constant(step, total, warmup, peak)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * _progress(step, total, warmup)))


def wsd(step: int, total: int, warmup: int, peak: float, floor: float = 0.0, tail: float = 0.2) -> float:
    """Warm-up, stable, decay: the peak until the last `tail` of all steps, then down as 1 − √ (Hu et al. 2024,
    arXiv:2404.06395; the shape of Hägele et al. 2024, arXiv:2405.18392). Training can continue from the peak."""
    begin = total - math.ceil(tail * total)
    if step < begin or step < warmup:
        return constant(step, total, warmup, peak)
    return floor + (peak - floor) * (1 - math.sqrt((step - begin) / max(1, total - begin)))


def _progress(step: int, total: int, warmup: int) -> float:
    return min(1.0, (step - warmup) / max(1, total - warmup))
