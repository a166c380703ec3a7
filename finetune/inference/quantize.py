"""Quantizers of inference: a dense weight (N, K) → the codes and scales that ops.quantized_linear multiplies with.

    fp32, bf16   the weight itself
    int8         w ≈ code · absmax of its row / 127                                 8 bits + 32 / K a weight
    int4         w ≈ code · scale + minimum of its 32 along the row, fp16           5 bits
    nf4          w ≈ NF4[code] · absmax of its 64 along the row, fp32               4.5 bits

int8 and NF4 round to the nearest code, as finetune/peft/quantize.py does. int4 looks for a better range than that of
the smallest and the largest weight: a few ranges narrower and wider give codes, least squares give those codes their
best scale and minimum, and the range with the smallest squared error stays. This is the idea of llama.cpp's
`make_qkx2_quants` (ggml-quants.c), without its weighting of the errors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.errors import UserError
from finetune.ops.quantized_linear import FORMATS, QuantizedWeight, dense, halves
from finetune.peft.quantize import BLOCK, NF4, int8_quantize, nearest

GROUP = 32  # weights of int4 that share a scale and a minimum
CHUNK = 1 << 12  # groups at once: what a search needs of them stays in the cache
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # ranges tried: 15 + step codes between the smallest and the largest weight


@torch.no_grad()
def quantize(weight: Tensor, format: str) -> QuantizedWeight:
    """weight (N, K) of any size and floating dtype → the same in one of FORMATS, on its device. UserError for another
    format, and for weights that are infinite, not a number, or beyond what int4's fp16 numbers hold."""
    rows, depth = weight.shape
    if format not in FORMATS:
        raise UserError(f"weights are not quantized to {format!r} (only {', '.join(FORMATS)})")
    if format in ("fp32", "bf16"):
        return dense(weight.detach().to(torch.float32 if format == "fp32" else torch.bfloat16).contiguous())
    if not bool(weight.isfinite().all()):
        raise UserError(f"weights that are infinite or not a number cannot be quantized to {format}")
    if format == "int8":
        codes, absmax = int8_quantize(weight)
        return QuantizedWeight(format, codes, absmax[:, None] / 127, None, depth, (rows, depth))
    if format == "int4":
        codes, scale, minimum = int4_quantize(weight)
        return QuantizedWeight(format, codes, scale, minimum, GROUP, (rows, depth))
    codes, absmax = nearest(F.pad(weight.float(), (0, -depth % BLOCK)).flatten(), NF4, BLOCK)
    codes = codes.view(rows, -1)[:, :depth]
    return QuantizedWeight(format, halves(codes), absmax.view(rows, -1), None, BLOCK, (rows, depth))


def int4_quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K) → packed codes (N, ⌈K/2⌉) uint8, scale and minimum (N, ⌈K/32⌉) fp16. The last group of a row may be
    short: it is fitted as if the row's last weight were repeated."""
    rows, depth = weight.shape
    whole = weight.detach().float()
    if depth % GROUP:
        whole = torch.cat([whole, whole[:, -1:].expand(-1, -depth % GROUP)], 1)
    groups = whole.reshape(-1, GROUP)
    fits = [fit(part.t().contiguous()) for part in groups.split(CHUNK)]
    codes, scale, minimum = (torch.cat(parts, -1) for parts in zip(*fits, strict=True))
    if not bool((scale.isfinite() & minimum.isfinite()).all()):
        most = float(weight.abs().max())
        raise UserError(f"weights up to {most:.3g} are too large for the fp16 scales of int4: use int8")
    return halves(codes.t().reshape(rows, -1)[:, :depth]), scale.view(rows, -1), minimum.view(rows, -1)


def fit(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups as columns (32, G) fp32 → codes (32, G) uint8, scale and minimum (G,) fp16 of the smallest squared error
    among the range of the weights themselves and those of STEPS."""
    low = w.amin(0)
    span = w.amax(0) - low
    best = rounded(w, span / 15, low)
    for step in STEPS:
        codes = ((w - low) * ((15 + step) / span.clamp(min=1e-30))).round_().clamp_(0, 15)
        found = rounded(w, *least_squares(w, codes))
        better = found[0] < best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    _, codes, scale, minimum = best
    return codes.to(torch.uint8), scale.half(), minimum.half()


def least_squares(w: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the minimum (G,) that minimize Σ (scale · code + minimum − w)² of each column."""
    n, codes_sum, w_sum = len(w), codes.sum(0), w.sum(0)
    spread = n * (codes * codes).sum(0) - codes_sum * codes_sum  # 0 only if all codes are equal
    scale = (n * (codes * w).sum(0) - codes_sum * w_sum) / spread.clamp(min=1)
    return scale, (w_sum - scale * codes_sum) / n


def rounded(w: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, ...]:
    """With scale and minimum rounded to fp16: the squared error of each column, the nearest codes, and the two."""
    scale, minimum = scale.half().float(), minimum.half().float()
    codes = ((w - minimum) / scale.clamp(min=1e-30)).round_().clamp_(0, 15)
    return torch.addcmul(minimum - w, codes, scale).square_().sum(0), codes, scale, minimum
