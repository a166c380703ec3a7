"""Projection onto the vocabulary and cross-entropy with z-loss, the logits never in memory at once. With L = x · Wᵀ:

    lse = log Σ exp(l_j)      loss = lse − l_t + z · lse²
    D_j = softmax(l)_j · (1 + 2 z lse) − [j = t]      dx = D · W      dW = Dᵀ · x

1. statistics: a program makes BM × BN tiles of L along its part of the vocabulary and keeps each row's running maximum
   and sum of exponentials in registers; the target's logit is stored where it passes by. Nothing else is written.
2. join: the parts of each row, its loss.
3. for each chunk of rows: D, from a second product, in the inputs' dtype (the only buffer: CHUNK_BYTES); then dx and dW
   by torch's matrix products, dW summed over the chunks in fp32.

The forward part is that of Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009), the chunks of gradients made in
the forward pass are Liger-Kernel's (Hsu et al. 2024, arXiv:2410.10989). Rows with ignore_index are left out of all
products: the host waits once, to know how many there are. Sums go in fixed orders, without atomics. D is multiplied by
1 / rows before it is rounded, by 1/1024 at the least, lest fp16 lose it.
FLOPs: 2 N V C forward, 6 N V C more with both gradients (8 with the product made again). Bytes: W once for each BM rows
forward (from L2 for the most part), D three times. Intensity: about BM FLOP/byte in bf16 forward: the tensor cores'
rate is the roof. fp32 products are "ieee".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check, empty_f32

CHUNK_BYTES = 64 << 20  # of D
PROGRAMS = 1024  # about as many in the first step, by parts of the vocabulary where there are few rows


@triton.jit
def logits_tile(
    x, weight, row, word, rows, vocab, dim, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # (BM,) and (BN,) → (BM, BN) fp32
    out = tl.zeros([BM, BN], tl.float32)
    x += row.to(tl.int64)[:, None] * dim
    weight += word.to(tl.int64)[None, :] * dim
    for first in range(0, dim, BK):
        column = first + tl.arange(0, BK)
        a = tl.load(x + column[None, :], mask=(row < rows)[:, None] & (column < dim)[None, :], other=0.0)
        b = tl.load(weight + column[:, None], mask=(word < vocab)[None, :] & (column < dim)[:, None], other=0.0)
        out = tl.dot(a, b, out, input_precision="ieee")
    return out


@triton.jit
def statistics_kernel(
    x, weight, targets, tops, sums, hits, rows, vocab, dim, words_of_part,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, BM)
    part = tl.program_id(0) // blocks  # rows fastest: neighbors read one part of the weight
    row = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    target = tl.load(targets + row, mask=row < rows, other=-1)
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    end = tl.minimum((part + 1) * words_of_part, vocab)
    for first in range(part * words_of_part, end, BN):
        word = first + tl.arange(0, BN)
        tile = logits_tile(x, weight, row, word, rows, vocab, dim, BM, BN, BK)
        is_target = word[None, :] == target[:, None]
        found = (target >= first) & (target < first + BN)
        tl.store(hits + row, tl.sum(tl.where(is_target, tile, 0.0), 1), mask=found & (row < rows))
        tile = tl.where((word < end)[None, :], tile, float("-inf"))
        best_now = tl.maximum(best, tl.max(tile, 1))
        total = total * tl.exp(best - best_now) + tl.sum(tl.exp(tile - best_now[:, None]), 1)
        best = best_now
    tl.store(tops + part.to(tl.int64) * rows + row, best, mask=row < rows)
    tl.store(sums + part.to(tl.int64) * rows + row, total, mask=row < rows)


@triton.jit
def join_kernel(tops, sums, hits, losses, stats, rows, parts, z_loss, BLOCK: tl.constexpr):
    """losses (rows,); stats (3, rows): the maximum, the logarithm of the sum, and 1 + 2 z lse."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        at = tl.cast(part, tl.int64) * rows + row
        top = tl.load(tops + at, mask=here, other=0.0)
        best_now = tl.maximum(best, top)
        total = total * tl.exp(best - best_now) + tl.load(sums + at, mask=here, other=1.0) * tl.exp(top - best_now)
        best = best_now
    log_sum = tl.log(total)
    lse = best + log_sum
    loss = best - tl.load(hits + row, mask=here, other=0.0) + log_sum + z_loss * lse * lse
    tl.store(losses + row, loss, mask=here)
    tl.store(stats + row, best, mask=here)
    tl.store(stats + rows + row, log_sum, mask=here)
    tl.store(stats + 2 * rows + row, 1 + 2 * z_loss * lse, mask=here)


@triton.jit
def dlogits_kernel(
    x, weight, targets, stats, dlogits, start, rows, chunk, vocab, dim, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """D of the rows start … start + chunk − 1, (chunk, V)."""
    blocks = tl.cdiv(chunk, BM)
    at = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    row, here = start + at, at < chunk
    word = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    tile = logits_tile(x, weight, row, word, rows, vocab, dim, BM, BN, BK)
    top, log_sum = tl.load(stats + row, mask=here, other=0.0), tl.load(stats + rows + row, mask=here, other=0.0)
    factor = tl.load(stats + 2 * rows + row, mask=here, other=0.0)
    target = tl.load(targets + row, mask=here, other=-1)
    p = tl.exp(tile - top[:, None] - log_sum[:, None]) * factor[:, None]
    d = (p - (word[None, :] == target[:, None]).to(tl.float32)) * scale
    to = dlogits + at.to(tl.int64)[:, None] * vocab + word[None, :]
    tl.store(to, d, mask=here[:, None] & (word < vocab)[None, :])


TILES = {16: (64, 128, 64, 8, 3), 32: (32, 32, 16, 4, 2)}  # bits of the dtype → BM, BN, BK, warps, stages; no spills


def tiles(x: Tensor) -> dict[str, int]:
    rows, words, depth, warps, stages = TILES[8 * x.element_size()]
    rows = min(rows, max(triton.next_power_of_2(len(x)), 16))
    return {"BM": rows, "BN": words, "BK": depth, "num_warps": warps, "num_stages": stages}


def kept(targets: Tensor, ignore_index: int, vocab: int) -> Tensor:
    """Positions of the targets that count; an error names the first that is out of the vocabulary."""
    positions = (targets != ignore_index).nonzero().flatten()  # the host waits here
    values = targets[positions]
    wrong = positions[(values < 0) | (values >= vocab)]
    if len(wrong):
        i = int(wrong[0])
        raise RuntimeError(
            f"linear_cross_entropy: targets[{i}] is {targets[i]}, outside the vocabulary of {vocab} (positions to skip "
            f"hold ignore_index = {ignore_index})"
        )
    return positions


def statistics(x: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    (rows, dim), vocab, shape = x.shape, len(weight), tiles(x)
    blocks, tiles_of_row = triton.cdiv(rows, shape["BM"]), triton.cdiv(vocab, shape["BN"])
    words = triton.cdiv(tiles_of_row, max(min(PROGRAMS // blocks, tiles_of_row), 1)) * shape["BN"]
    parts = triton.cdiv(vocab, words)
    tops, sums = (empty_f32(x, parts, rows) for _ in range(2))
    hits, losses, stats = empty_f32(x, rows), empty_f32(x, rows), empty_f32(x, 3, rows)
    statistics_kernel[(blocks * parts,)](x, weight, targets, tops, sums, hits, rows, vocab, dim, words, **shape)
    grid = (triton.cdiv(rows, 256),)
    join_kernel[grid](tops, sums, hits, losses, stats, rows, parts, z_loss, BLOCK=256, num_warps=4)
    return losses, stats


def gradients(
    x: Tensor, weight: Tensor, targets: Tensor, stats: Tensor, scale: float, dx: Tensor | None, dweight: Tensor | None
) -> None:
    """Fills dx (rows, C) and dweight (V, C), where wanted."""
    (rows, dim), vocab, shape = x.shape, len(weight), tiles(x)
    most = max(CHUNK_BYTES // (vocab * x.element_size()), 64)
    chunk = triton.cdiv(rows, triton.cdiv(rows, most))
    before = max(scale, 1 / 1024)
    after = scale / before
    dlogits = x.new_empty(chunk, vocab)
    dweight_sum = None if dweight is None or chunk == rows else torch.zeros_like(weight, dtype=torch.float32)
    for start in range(0, rows, chunk):
        part = x[start : start + chunk]
        d = dlogits[: len(part)]
        grid = (triton.cdiv(len(part), shape["BM"]) * triton.cdiv(vocab, shape["BN"]),)
        dlogits_kernel[grid](x, weight, targets, stats, d, start, rows, len(part), vocab, dim, before, **shape)
        if dx is not None:
            torch.mm(d, weight, out=dx[start : start + chunk])
        if dweight_sum is not None:
            dweight_sum += d.t() @ part
        elif dweight is not None:
            torch.mm(d.t(), part, out=dweight)
    if dweight is not None and dweight_sum is not None:
        dweight.copy_(dweight_sum)
    if after != 1:
        for grad in (dx, dweight):
            if grad is not None:
                grad *= after


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool, x_grad: bool,
    weight_grad: bool, bf16_matmul: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "linear_cross_entropy"
    check(x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1], op, "x (N, C) and weight (V, C) expected")
    check(targets.shape == x.shape[:1] and targets.dtype == torch.int64, op, "targets must be (N,) int64 for x (N, C)")
    weight, (vocab, dim) = weight.contiguous(), weight.shape
    positions = kept(targets, ignore_index, vocab)
    rows = len(positions)
    dx = torch.zeros(len(x) if x_grad else 0, dim, dtype=x.dtype, device=x.device)
    dweight = weight.new_zeros(vocab if weight_grad else 0, dim)
    if not rows:
        return empty_f32(x).zero_(), dx, dweight
    few = rows < len(x)
    given, wanted = (x[positions], targets[positions]) if few else (x.contiguous(), targets.contiguous())
    losses, stats = statistics(given, weight, wanted, z_loss)
    scale = 1 / rows if mean else 1.0
    if x_grad or weight_grad:
        dgiven = (torch.empty_like(given) if few else dx) if x_grad else None
        gradients(given, weight, wanted, stats, scale, dgiven, dweight if weight_grad else None)
        if dgiven is not None and few:
            dx[positions] = dgiven
    return (losses.sum(dtype=torch.float64) * scale).float(), dx, dweight


OPERATORS = {"linear_cross_entropy": linear_cross_entropy}


def typical(dtype: torch.dtype):
    x, weight = torch.zeros(64, 64, dtype=dtype), torch.zeros(4096, 64, dtype=dtype)
    yield "linear_cross_entropy", (x, weight, torch.zeros(64, dtype=torch.int64), -100, 0.0, True, True, True, None)
