"""Comparison of a backend with the reference on a sample: results, changed arguments and gradients, within a bound.

Bound (flash-attention's): the error may be twice that of torch in the same dtype, plus one unit of that dtype at the
largest magnitude of the result; both errors against float64 on the same, already rounded, inputs. Torch's error is that
of the plain-torch reference or of torch's own kernel for the op, where it has one, whichever is larger. On a GPU some
functions are approximate by documentation (`GPU_ULPS`), and the bound has so much more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finetune.ops._backends import device_for
from finetune.ops._op import REGISTRY
from finetune.ops._samples import Sample, place

# The largest errors, in units in the last place, that CUDA documents for what the kernels call (CUDA C++ Programming
# Guide, "Mathematical Functions"; the PTX ISA's ex2.approx and div.full for exp2 and Triton's division). __expf's is
# 2 + 1.17 |x|, which is 2 units of 1 at the most for the x <= 0 that it gets. Sums and products round to nearest.
GPU_ULPS = {
    name: ulps
    for ulps, names in (
        (0, "sqrtf sqrt tl.sqrt_rn tl.div_rn"),
        (1, "logf log2f log tl.log tl.log2"),
        (2, "rsqrtf expf __expf exp2 __fdividef tl.exp tl.exp2"),
        (4, "tl.sigmoid"),  # an exponential and a division
    )
    for name in names.split()
}
# A result is a sum of products with at most three such values (rstd³ in the norms' dx, σ² in swiglu's gradient), each
# of which has been through an exponential and a division at the most.
GPU_UNITS = 3 * max(GPU_ULPS.values())


class WrongResult(AssertionError):
    """A backend's result is not the reference's; the message says where and by how much."""


def flat(value: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples, in order."""
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value] if isinstance(value, Tensor) else []


def widen(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating tensors, also those in lists, as float64; those of 8 bits are stored data and stay."""

    def one(arg: Any) -> Any:
        if isinstance(arg, list):
            return [one(item) for item in arg]
        if isinstance(arg, Tensor) and arg.is_floating_point() and arg.itemsize > 1:
            return arg.detach().double().requires_grad_(arg.requires_grad)
        return arg

    return tuple(one(arg) for arg in args)


def plain(t: Tensor) -> Tensor:
    """8-bit floats as float32: few of torch's operations know them."""
    return t.float() if t.is_floating_point() and t.dtype.itemsize == 1 else t


def unchanged(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN where the other is NaN."""
    a, b = plain(a), plain(b)
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def cotangents(result: Any, dtype: torch.dtype) -> list[Tensor]:
    """The gradient that comes in at each result: normal, rounded to `dtype`, the same at every call."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=g).to(dtype).to(y.device, y.dtype) for y in flat(result)]


def run(op: str, sample: Sample, dtype: torch.dtype, backend: str | Callable, wide: bool = False) -> list[Tensor]:
    """Results, then mutated arguments, then gradients, by a backend (on its kind of device; the results come back to
    the CPU) or by any function called like the reference. `wide`: float64 arithmetic on inputs rounded to `dtype`."""
    device = device_for(backend) if isinstance(backend, str) else "cpu"
    args, options = sample.cast(dtype, device), sample.options(device)
    if wide:
        args = widen(args)
    before = [leaf.detach().clone() for leaf in flat(args)]
    call = partial(REGISTRY[op], backend=backend) if isinstance(backend, str) else backend
    result = call(*args, **options)
    out = flat(result) + [leaf for i in sample.mutates for leaf in flat(args[i])]
    changed = {id(leaf) for i in sample.mutates for leaf in flat(args[i])}
    for leaf, old in zip(flat(args), before, strict=True):
        if id(leaf) not in changed and not unchanged(leaf, old):
            raise WrongResult(f"{op}, {sample.name}: an input changed")
    if sample.grad:
        incoming = cotangents(result, dtype)
        if "incoming gradient" in sample.odd:
            incoming = [place(g.shape, g.stride(), g.dtype, str(g.device), True, None).copy_(g) for g in incoming]
        out += torch.autograd.grad(flat(result), [args[i] for i in sample.grad], incoming)
    return [plain(leaf.detach()).cpu() for leaf in out]


def floor(dtype: torch.dtype, largest: float, device: str) -> float:
    """The error that a result of `dtype` may have whatever torch's is: one unit at its largest magnitude, one of fp32
    since arithmetic is fp32, and on a GPU those of its functions, of fp32 too."""
    unit, fp32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    return unit * largest + fp32 + (GPU_UNITS * fp32 * (1 + largest) if device == "cuda" else 0.0)


def check_close(
    got: list[Tensor], by_torch: list[list[Tensor]], exact: list[Tensor], dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Raises WrongResult unless all of `got`, from a device, is within the bound. `by_torch`: the reference's results
    first."""
    if len(got) != len(exact):
        raise WrongResult(f"{len(got)} results, not {len(exact)}")
    for i, (mine, want, *theirs) in enumerate(zip(got, exact, *by_torch, strict=True)):
        if mine.shape != want.shape or mine.dtype != theirs[0].dtype:
            raise WrongResult(f"result {i}: {mine.dtype} {[*mine.shape]}, not {theirs[0].dtype} {[*want.shape]}")
        if not want.numel():
            continue
        kind = mine.dtype if mine.is_floating_point() else dtype
        mine, want = mine.double(), want.double()
        theirs = [result.double() for result in theirs]
        finite = want.isfinite()
        if not torch.equal(mine.isfinite(), finite) or not unchanged(mine[~finite], want[~finite]):
            raise WrongResult(f"result {i} is not finite where the reference is, or the other way round")
        mine, want, *theirs = (torch.where(finite, t, 0) for t in (mine, want, *theirs))
        error = (mine - want).abs().max().item()
        errors = [(result - want).abs().max().item() for result in theirs]
        bound = 2 * max((e for e in errors if math.isfinite(e)), default=0.0)  # torch's may let NaN through
        bound += floor(kind, want.abs().max().item(), device)
        if not error <= bound:
            raise WrongResult(f"result {i}: error {error:.3g} > bound {bound:.3g}")


def check(op: str, sample: Sample, dtype: torch.dtype, backend: str) -> None:
    """Raises WrongResult unless `backend` agrees with the reference on values, mutated arguments and gradients."""
    exact = run(op, sample, dtype, "reference", wide=True)
    torch_kernel = REGISTRY[op].torch_kernel
    by_torch = [run(op, sample, dtype, how) for how in ("reference", torch_kernel) if how]
    try:
        check_close(run(op, sample, dtype, backend), by_torch, exact, dtype, device_for(backend))
    except WrongResult as error:
        where = f"{op} on {backend}, sample {sample.name!r}, {str(dtype).removeprefix('torch.')}"
        raise WrongResult(f"{where}: {error}") from None
