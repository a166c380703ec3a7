"""Products with weights in few bits: y = x · Wᵀ + bias, W (N, K) = scale · code + minimum in groups along K.

The weight is read as finetune/ops/quantized_linear.py defines it, in rows. A program makes BLOCK_M × BLOCK_N of y and
walks along K by BLOCK_K: a group, or 32 terms where a scale is a row's. Codes become elements of x's type, exactly
(NF4's values are rounded to it), and the products' fp32 sum of a group is multiplied by its scale; a minimum adds
minimum · Σ x. So scales and minima cost BLOCK_M · BLOCK_N operations a group and round no weight. 4-bit codes are
loaded as bytes and interleaved in registers. fp32 (of x or W) is multiplied as "ieee", bf16 weights with x in fp16 too.
FLOPs 2 M N K; bytes: the weight once for each BLOCK_M rows of x. Up to 16 rows of x take tiles of 16, more take larger
ones: within either, a row of y depends on its own row of x alone, to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, check

FEW = 16  # rows of x
CODES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.uint8)  # of fp32, bf16, int8, int4, nf4
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
tables: dict[torch.device, Tensor] = {}


@triton.jit
def quantized_linear_kernel(
    x, codes, scale, minimum, bias, table, y, n_rows, n, k, x_stride, row_bytes, groups,
    FORMAT: tl.constexpr, GROUPED: tl.constexpr, MINIMA: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    down = tl.cdiv(n_rows, BLOCK_M)  # rows of x fastest: neighbors read one part of the weight
    token = (tl.program_id(0) % down * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row = (tl.program_id(0) // down * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    kind = tl.float32 if WIDE else x.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, k, BLOCK_K):
        term = first + tl.arange(0, BLOCK_K)
        a = tl.load(
            x + token[:, None] * x_stride + term[None, :],
            mask=(token < n_rows)[:, None] & (term < k)[None, :],
            other=0.0,
        )
        if FORMAT >= 3:
            byte = first // 2 + tl.arange(0, BLOCK_K // 2)
            pairs = tl.load(
                codes + row[:, None] * row_bytes + byte[None, :],
                mask=(row < n)[:, None] & (byte < row_bytes)[None, :],
                other=0,
            )
            code = tl.interleave(pairs & 15, pairs >> 4)  # (BLOCK_N, BLOCK_K)
        else:
            code = tl.load(
                codes + row[:, None] * row_bytes + term[None, :],
                mask=(row < n)[:, None] & (term < k)[None, :],
                other=0,
            )
        if FORMAT == 4:
            w = tl.load(table + code.to(tl.int32)).to(kind)
        elif FORMAT == 3:
            w = (code.to(tl.int32) - (0 if MINIMA else 8)).to(tl.float32).to(kind)
        else:
            w = code.to(tl.float32).to(kind)
        product = tl.dot(a.to(kind), tl.trans(w), input_precision="ieee")
        if GROUPED:
            at = row * groups + first // BLOCK_K
            product *= tl.load(scale + at, mask=row < n, other=0.0).to(tl.float32)[None, :]
            if MINIMA:
                least = tl.load(minimum + at, mask=row < n, other=0.0).to(tl.float32)
                product += tl.sum(a.to(tl.float32), 1)[:, None] * least[None, :]
        acc += product
    if FORMAT >= 2 and not GROUPED:
        acc *= tl.load(scale + row, mask=row < n, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[None, :]
    inside = (token < n_rows)[:, None] & (row < n)[None, :]
    tl.store(y + token[:, None] * n + row[None, :], acc.to(y.dtype.element_ty), mask=inside)


def quantized_linear(
    x: Tensor, codes: Tensor, scale: Tensor | None, minimum: Tensor | None, bias: Tensor | None, format: int, rows: int,
    group: int,
) -> Tensor:  # fmt: skip
    op = "quantized_linear"
    k = x.shape[-1]
    check(codes.dtype == CODES[format] and codes.dim() == 2 and codes.shape[0] == rows, op, "a weight in rows expected")
    check(codes.shape[1] == (triton.cdiv(k, 2) if format >= 3 else k), op, "x must be (…, K) for a weight (N, K)")
    check((scale is not None) == (format >= 2), op, "int8, int4 and nf4 have scales")
    y = x.new_empty(*x.shape[:-1], rows)
    if not y.numel():
        return y
    seen, stride = as_rows(x)
    group = group or (0 if format == 2 else 64 if format == 4 else 32)  # a short row of 4-bit codes still has a group
    grouped = format >= 2 and group > 0
    wide = x.dtype == torch.float32 or format == 0 or (format == 1 and x.dtype != torch.bfloat16)
    table = x  # unless there is one
    if format == 4:
        table = tables.setdefault(x.device, torch.tensor(NF4, device=x.device))
    size = 16 if len(seen) <= FEW else 32 if wide else 64  # products in fp32 hold their operands in registers
    width = 32 if len(seen) <= FEW or wide else 64
    scales = codes if scale is None else scale.contiguous()
    quantized_linear_kernel[(triton.cdiv(len(seen), size) * triton.cdiv(rows, width),)](
        seen, codes.contiguous(), scales, scales if minimum is None else minimum.contiguous(),
        x if bias is None else bias.contiguous(), table, y,
        len(seen), rows, k, stride, codes.shape[1], scales.shape[1],
        FORMAT=format, GROUPED=grouped, MINIMA=minimum is not None, BIAS=bias is not None, WIDE=wide,
        BLOCK_M=size, BLOCK_N=width, BLOCK_K=group if grouped else 32, num_warps=4 if size == 16 and not wide else 8,
    )  # fmt: skip
    return y


OPERATORS = {"quantized_linear": quantized_linear}


def typical(dtype: torch.dtype):
    n, k = 1024, 2048
    for count in (1, 256):
        x = torch.empty(count, k, dtype=dtype)
        for format, group in ((0, 0), (1, 0), (2, 0), (2, 16), (2, 32), (3, 32), (4, 64)):
            codes = torch.empty(n, k // 2 if format >= 3 else k, dtype=CODES[format])
            scale = torch.empty(n, k // group if group else 1, dtype=torch.float16) if format >= 2 else None
            minimum = scale if format == 3 else None
            yield "quantized_linear", (x, codes, scale, minimum, None, format, n, group)
