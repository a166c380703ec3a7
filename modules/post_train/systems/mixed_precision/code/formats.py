"""The number formats and their remedies: a master copy, stochastic rounding, delayed scaling for fp8.

              exponent, mantissa bits   largest    smallest normal, subnormal   last bit at 1
fp32                 8, 23              3.4e38     1.2e-38, 1.4e-45             1.2e-7
bf16                 8, 7               3.4e38     1.2e-38, 9.2e-41             7.8e-3
fp16                 5, 10              65504      6.1e-5,  6.0e-8              9.8e-4
fp8 e4m3             4, 3               448        1.6e-2,  2.0e-3              0.125
fp8 e5m2             5, 2               57344      6.1e-5,  1.5e-5              0.25
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import ops
from finetune.runs.run import stable_hash

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


@dataclass(frozen=True)
class Format:
    """How a model is stored and updated."""

    dtype: torch.dtype  # of weights, activations and gradients
    master: bool = True  # the optimizer keeps an fp32 copy of 16-bit weights
    stochastic: bool = False  # without a master: the updated weight is rounded stochastically
    scaled: bool = False  # dynamic loss scaling
    fp8: bool = False  # the blocks' linear layers multiply in fp8


FORMATS = {
    "fp32": Format(torch.float32),
    "bf16": Format(torch.bfloat16),
    "bf16_no_master": Format(torch.bfloat16, master=False),
    "bf16_stochastic": Format(torch.bfloat16, master=False, stochastic=True),
    "fp16": Format(torch.float16),
    "fp16_scaled": Format(torch.float16, scaled=True),
    "fp8": Format(torch.bfloat16, fp8=True),
}


# --- Rounding


def round_by_hand(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 → bf16, rounded up with the probability of the fraction that is cut off, so that the mean is x.

    A bf16 is the upper half of an fp32: adding a random number of 16 bits (`noise`, int32 in [0, 65536)) to the lower
    half carries into the upper half with exactly that probability. `ops.cast(…, rounding="stochastic")` does it for
    every format; the tests hold them equal bit for bit.
    """
    bits = (x.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


class StochasticAdamW:
    """AdamW on bf16 weights without a master copy: each weight is widened, updated and rounded stochastically."""

    def __init__(self, params: Iterable[nn.Parameter], weight_decay: float, seed: int) -> None:
        self.params, self.weight_decay, self.seed, self.steps = list(params), weight_decay, seed, 0
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p, dtype=torch.float32) for p in self.params] for _ in "mv")

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float | Tensor = 1.0) -> None:
        self.steps += 1
        for i, (p, m, v) in enumerate(zip(self.params, self.exp_avg, self.exp_avg_sq, strict=True)):
            assert p.grad is not None
            wide, decay = p.float(), self.weight_decay if p.dim() >= 2 else 0.0
            ops.adamw_([wide], [p.grad.float()], [m], [v], None, lr=lr, beta1=0.9, beta2=0.999, eps=1e-8,
                       weight_decay=decay, step=self.steps, grad_scale=grad_scale)  # fmt: skip
            seed = stable_hash(self.seed, self.steps, i)
            p.copy_(ops.cast(wide, p.dtype, rounding="stochastic", seed=seed))

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        moments = zip(self.exp_avg, self.exp_avg_sq, strict=True)
        return {"steps": self.steps, "moments": {str(i): {"m": m, "v": v} for i, (m, v) in enumerate(moments)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for i, saved in state["moments"].items():
            self.exp_avg[int(i)].copy_(saved["m"])
            self.exp_avg_sq[int(i)].copy_(saved["v"])


# --- fp8 with delayed scaling


class Amax(nn.Module):
    """The largest magnitudes of a tensor in its last calls, and the factor that scales it to the range of fp8.

    The factor is needed before the tensor is known, so it comes from the past: delayed scaling (Micikevicius et al.
    2022, arXiv:2209.05433; TransformerEngine's DelayedScaling). A value beyond them saturates.
    """

    history: Tensor

    def __init__(self, dtype: torch.dtype, length: int) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("history", torch.zeros(length, dtype=torch.float32))

    def quantize(self, x: Tensor) -> tuple[Tensor, float]:
        """x · factor in fp8, and the factor. x's own maximum is for the next call."""
        most, limit = float(self.history.max()), LARGEST[self.dtype]
        factor = limit / most if most > 0 else 1.0
        self.history.copy_(self.history.roll(1))
        self.history[0] = x.abs().max()
        return to_fp8(x, self.dtype, factor), factor


def to_fp8(x: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """x · factor in fp8, rounded to nearest even; a value that is too large becomes the largest."""
    return ops.cast(x, dtype, scale=factor, saturate=True)


class Fp8Linear(nn.Module):
    """y = x·Wᵀ + b with x and W in e4m3 and the gradient of y in e5m2 (range matters more than precision there).

    The products are exact in fp32 and summed in fp32, as a tensor core does; y, dx and dW are rounded to x's dtype.
    """

    def __init__(self, linear: nn.Linear, history: int = 16) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.x_amax, self.w_amax, self.g_amax = Amax(E4M3, history), Amax(E4M3, history), Amax(E5M2, history)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Fp8Product.apply(x, self.weight, self)  # type: ignore[no-untyped-call]
        return y + self.bias


class Fp8Product(torch.autograd.Function):
    """x · Wᵀ, forward and backward, in fp8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, layer: Fp8Linear) -> Tensor:
        x8, x_factor = layer.x_amax.quantize(x.detach())
        w8, w_factor = layer.w_amax.quantize(w.detach())
        ctx.save_for_backward(x8, w8)
        ctx.factors, ctx.layer, ctx.dtype = (x_factor, w_factor), layer, x.dtype
        return (F.linear(x8.float(), w8.float()) / (x_factor * w_factor)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x8, w8 = ctx.saved_tensors
        x_factor, w_factor = ctx.factors
        g8, g_factor = ctx.layer.g_amax.quantize(grads[0])
        g = g8.float()
        dx = (g @ w8.float()) / (g_factor * w_factor)
        dw = g.flatten(0, -2).t() @ x8.float().flatten(0, -2) / (g_factor * x_factor)
        return dx.to(ctx.dtype), dw.to(ctx.dtype), None


def use_fp8(model: nn.Module, history: int = 16) -> None:
    """Replaces the linear layers of the blocks. Embeddings, norms, attention and the head stay as they are."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Fp8Linear(child, history))
