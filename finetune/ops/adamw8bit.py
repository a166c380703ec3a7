"""AdamW with block-wise 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861), in place.

Each moment is one byte an element, the index of a value of the dynamic map, and one fp32 number for each block of 256
elements, the largest magnitude in it:  m = map[code] · absmax.  A step widens both moments, does what ops.adamw_ does
in fp32, and rounds them to the nearest of the map's values; the parameters see the moments before that rounding.

    absmax = max |m| over the block          code = argmin over i of |map[i] − m / absmax|   (0 where absmax is 0)

The map (paper, section 2.1 and appendix F): a sign bit, zeros that count the decades below 1, a one, and the bits that
remain divide the decade [0.1, 1] evenly. exp_avg_sq has no sign and one bit more for the division.
Every backend does the same fp32 operations in the same order, so that their moments agree to the last bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from finetune.ops import adamw
from finetune.ops._backends import wrong_device
from finetune.ops._lists import optimizer_lists
from finetune.ops._op import op
from finetune.ops._samples import SMOLLM2_BLOCK, Sample

BLOCK = 256


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """(256,) fp32 in ascending order: 0, 1, and for each decade 10^−e, e = 6 … 0, the middles of 2^(6 − e) equal parts
    of [0.1, 1] · 10^−e with both signs, or of twice as many with one."""
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()  # in fp32, as bitsandbytes
        values += [sign * x for x in middles for sign in ((1, -1) if signed else (1,))]
    return torch.tensor(sorted(values))


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Maps and middles, (2, 256) each: of exp_avg and of exp_avg_sq."""
    maps = torch.stack([dynamic_map(True), dynamic_map(False)])
    middles = torch.cat([(maps[:, :-1] + maps[:, 1:]) * 0.5, torch.full((2, 1), math.inf)], 1)
    return maps.to(device), middles.to(device)


def blocks_of(x: Tensor) -> int:
    return -(-x.numel() // BLOCK)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """x of any shape → codes, uint8 like x, and absmax (ceil(numel / 256),) of x's dtype."""
    _, middles = tables(x.device)
    rows = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = rows.abs().amax(1, keepdim=True) if rows.numel() else rows.new_zeros(0, 1)
    y = torch.where(absmax > 0, rows / absmax, 0.0)
    codes = torch.bucketize(y, middles[0 if signed else 1, :-1].to(x.dtype)).to(torch.uint8)
    return codes.flatten()[: x.numel()].view(x.shape), absmax.flatten()


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The values of the codes, in absmax's dtype."""
    values = tables(codes.device)[0][0 if signed else 1].to(absmax.dtype)[codes.long().flatten()]
    return (values * absmax.repeat_interleave(BLOCK)[: values.numel()]).view(codes.shape)


@op
@torch.no_grad()
def adamw8bit_(
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_maxs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    exp_avg_sq_maxs: Iterable[Tensor],
    masters: Iterable[Tensor] | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> None:
    """One step over lists of tensors, in place; see ops.adamw_ for params, grads, masters and the numbers.

    exp_avgs, exp_avg_sqs: uint8 codes like the parameters; exp_avg_maxs, exp_avg_sq_maxs: (ceil(numel / 256),) fp32.
    `states_like` makes those of the first step. A gradient that is not finite spoils its block: look at the norm first.
    """
    step_size, rsqrt_bc2 = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    states = (exp_avgs, exp_avg_maxs, exp_avg_sqs, exp_avg_sq_maxs)
    for p, g, mc, mx, vc, vx, target in zip(params, grads, *states, masters or params, strict=True):
        wide = torch.promote_types(target.dtype, torch.float32)
        g = g.to(wide) * grad_scale
        m = dequantize(mc, mx, True).to(wide) * beta1 + g * (1 - beta1)
        v = dequantize(vc, vx, False).to(wide) * beta2 + g * g * (1 - beta2)
        size = step_size * m / (v.sqrt() * rsqrt_bc2 + eps)
        target.copy_(target.to(wide) * (1 - lr * weight_decay) - size)
        p.copy_(target)
        for codes, absmax, value, signed in ((mc, mx, m, True), (vc, vx, v, False)):
            new_codes, new_max = quantize(value, signed)
            codes.copy_(new_codes)
            absmax.copy_(new_max)


def states_like(p: Tensor) -> dict[str, Tensor]:
    """The state of zero moments, under the names of adamw8bit_'s arguments."""
    zero = {signed: int(quantize(torch.zeros(1), signed)[0]) for signed in (True, False)}
    return {
        "exp_avg": torch.full_like(p, zero[True], dtype=torch.uint8),
        "exp_avg_max": torch.zeros(blocks_of(p), device=p.device),
        "exp_avg_sq": torch.full_like(p, zero[False], dtype=torch.uint8),
        "exp_avg_sq_max": torch.zeros(blocks_of(p), device=p.device),
    }


@adamw8bit_.check
def _(params, masters, grads, exp_avgs, exp_avg_maxs, exp_avg_sqs, exp_avg_sq_maxs, **_):
    return optimizer_lists(
        "adamw8bit_", params, masters, grads=grads, exp_avgs=exp_avgs, exp_avg_maxs=exp_avg_maxs,
        exp_avg_sqs=exp_avg_sqs, exp_avg_sq_maxs=exp_avg_sq_maxs,
    )  # fmt: skip


@adamw8bit_.operands
def _(params: list[Tensor], **given) -> dict[str, object]:
    maps, middles = tables(params[0].device)
    return adamw.operands(**given) | {"maps": maps, "middles": middles}


@adamw8bit_.supports
def _(backend: str, params, grads, masters, grad_scale, exp_avgs, exp_avg_maxs, exp_avg_sqs, exp_avg_sq_maxs, **_):
    codes = [*exp_avgs, *exp_avg_sqs]
    if any(t.dtype != torch.uint8 for t in codes):
        return "it takes moments in uint8"
    if reason := wrong_device(backend, *codes):
        return reason
    if not all(t.is_contiguous() for t in codes):
        return "it takes contiguous parameters, moments and masters"
    return adamw.takes(backend, params, grads, [*exp_avg_maxs, *exp_avg_sq_maxs, *(masters or [])], grad_scale)


@adamw8bit_.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name, shapes, masters=False, moments=1.0, scale=1.0, bench=False, **kwargs) -> Sample:
        def draw(dtype=torch.float64):
            return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]

        def args():
            first = [quantize(t * moments, True) for t in draw(torch.float32)]
            second = [quantize(t.square() * moments, False) for t in draw(torch.float32)]
            copies = draw(torch.float32) if masters else None
            states = [[t[i] for t in moment] for moment in (first, second) for i in (0, 1)]
            return draw(), [t * scale for t in draw()], *states, copies

        n = sum(math.prod(shape) for shape in shapes)
        hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 7} | kwargs
        mutates = (0, 2, 3, 4, 5, 6) if masters else (0, 2, 3, 4, 5)
        given = args if bench else args()
        return Sample(name, given, hyper, mutates=mutates, bench=bench, flops=60.0 * n, bytes=16.0 * n)

    yield make("small", [(3, 4), (5,)])
    yield make("first step", [(37,), (1,), (2, 3, 5)], moments=0.0, step=1)
    yield make("masters", [(16, 64), (255,), (257,)], masters=True)
    yield make("clipped", [(33, 9), (7,)], masters=True, grad_scale=0.3)
    yield make("clipped by a tensor", [(33, 9)], grad_scale=torch.tensor(0.3))
    yield make("no gradient", [(300,)], moments=0.0, scale=0.0, step=1)
    yield make("large gradients, no decay", [(41,)], scale=1e4, weight_decay=0.0)
    yield make("pieces", [(5000,), (40000,)])
    yield make("many", [(3,)] * 55)
    yield make("empty", [(0, 4), (3,)])
    yield from make("aligned", [(512,), (4, 64)], masters=True, grad_scale=torch.tensor(0.3)).at_odd_addresses()
    yield make("bench", SMOLLM2_BLOCK * 8, bench=True)
    yield make("bench masters", SMOLLM2_BLOCK * 8, masters=True, bench=True)
