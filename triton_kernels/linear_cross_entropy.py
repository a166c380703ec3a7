"""Projection onto the vocabulary and cross-entropy with z-loss, the logits never in memory at once. With L = x · Wᵀ:

    lse = log Σ exp(l_j)      loss = lse − l_t + z · lse²
    D_j = softmax(l)_j · (1 + 2 z lse) − [j = t]      dx = D · W      dW = Dᵀ · x

1. statistics: a program makes BLOCK_M × BLOCK_N tiles of L along its part of the vocabulary and keeps each row's
   running maximum m and sum l of exponentials in registers; the target's logit is stored where it passes by. Nothing
   else is written.
2. join: the parts of each row, its loss.
3. for each chunk of rows: D, from a second product, in the inputs' dtype (the only buffer: CHUNK_BYTES); then dx and dW
   by torch's matrix products, dW summed over the chunks in fp32.

The forward part is that of Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009), the chunks of gradients made in
the forward pass are Liger-Kernel's (Hsu et al. 2024, arXiv:2410.10989). Rows with ignore_index are left out of all
products: the host waits once, to know how many there are. Sums go in fixed orders, without atomics. D is multiplied by
1 / rows before it is rounded, by 1/1024 at the least, lest fp16 lose it.
FLOPs: 2 N V C forward, 6 N V C more with both gradients (8 with the product made again). Bytes: W once for each BLOCK_M
rows forward (from L2 for the most part), D three times. Intensity: about BLOCK_M FLOP/byte in bf16 forward: the tensor
cores' rate is the roof. fp32 products are "ieee".
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
    x, weight, row, token, n_rows, vocab, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # (BLOCK_M,) and (BLOCK_N,) → (BLOCK_M, BLOCK_N) fp32
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x += row.to(tl.int64)[:, None] * n_cols
    weight += token.to(tl.int64)[None, :] * n_cols
    for first in range(0, n_cols, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(x + k[None, :], mask=(row < n_rows)[:, None] & (k < n_cols)[None, :], other=0.0)
        b = tl.load(weight + k[:, None], mask=(token < vocab)[None, :] & (k < n_cols)[:, None], other=0.0)
        out = tl.dot(a, b, out, input_precision="ieee")
    return out


@triton.jit
def statistics_kernel(
    x, weight, targets, m_parts, l_parts, target_logits, n_rows, vocab, n_cols, tokens_of_part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_rows, BLOCK_M)
    part = tl.program_id(0) // blocks  # rows fastest: neighbors read one part of the weight
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(targets + row, mask=row < n_rows, other=-1)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum((part + 1) * tokens_of_part, vocab)
    for first in range(part * tokens_of_part, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        tile = logits_tile(x, weight, row, token, n_rows, vocab, n_cols, BLOCK_M, BLOCK_N, BLOCK_K)
        is_target = token[None, :] == target[:, None]
        found = (target >= first) & (target < first + BLOCK_N)
        tl.store(target_logits + row, tl.sum(tl.where(is_target, tile, 0.0), 1), mask=found & (row < n_rows))
        tile = tl.where((token < end)[None, :], tile, float("-inf"))
        m_new = tl.maximum(m, tl.max(tile, 1))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(tile - m_new[:, None]), 1)
        m = m_new
    tl.store(m_parts + part.to(tl.int64) * n_rows + row, m, mask=row < n_rows)
    tl.store(l_parts + part.to(tl.int64) * n_rows + row, l, mask=row < n_rows)


@triton.jit
def join_kernel(m_parts, l_parts, target_logits, losses, stats, n_rows, parts, z_loss, BLOCK_SIZE: tl.constexpr):
    """losses (n_rows,); stats (3, n_rows): the maximum, the logarithm of the sum, and 1 + 2 z lse."""
    row = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    here = row < n_rows
    m = tl.full([BLOCK_SIZE], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_SIZE], tl.float32)
    for part in range(parts):
        at = tl.cast(part, tl.int64) * n_rows + row
        m_part, l_part = tl.load(m_parts + at, mask=here, other=0.0), tl.load(l_parts + at, mask=here, other=1.0)
        m_new = tl.maximum(m, m_part)
        l = l * tl.exp(m - m_new) + l_part * tl.exp(m_part - m_new)
        m = m_new
    log_sum = tl.log(l)
    lse = m + log_sum
    loss = m - tl.load(target_logits + row, mask=here, other=0.0) + log_sum + z_loss * lse * lse
    tl.store(losses + row, loss, mask=here)
    tl.store(stats + row, m, mask=here)
    tl.store(stats + n_rows + row, log_sum, mask=here)
    tl.store(stats + 2 * n_rows + row, 1 + 2 * z_loss * lse, mask=here)


@triton.jit
def dlogits_kernel(
    x, weight, targets, stats, dlogits, start, n_rows, chunk, vocab, n_cols, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """D of the rows start … start + chunk − 1, (chunk, V)."""
    blocks = tl.cdiv(chunk, BLOCK_M)
    at = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row, here = start + at, at < chunk
    token = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = logits_tile(x, weight, row, token, n_rows, vocab, n_cols, BLOCK_M, BLOCK_N, BLOCK_K)
    m, log_sum = tl.load(stats + row, mask=here, other=0.0), tl.load(stats + n_rows + row, mask=here, other=0.0)
    factor = tl.load(stats + 2 * n_rows + row, mask=here, other=0.0)
    target = tl.load(targets + row, mask=here, other=-1)
    p = tl.exp(tile - m[:, None] - log_sum[:, None]) * factor[:, None]
    d = (p - (token[None, :] == target[:, None]).to(tl.float32)) * scale
    to = dlogits + at.to(tl.int64)[:, None] * vocab + token[None, :]
    tl.store(to, d, mask=here[:, None] & (token < vocab)[None, :])


TILES = {16: (64, 128, 64, 8, 3), 32: (32, 32, 16, 4, 2)}  # bits of the dtype → M, N, K, warps, stages; no spills


def tiles(x: Tensor) -> dict[str, int]:
    n_rows, tokens, depth, warps, stages = TILES[8 * x.element_size()]
    n_rows = min(n_rows, max(triton.next_power_of_2(len(x)), 16))
    return {"BLOCK_M": n_rows, "BLOCK_N": tokens, "BLOCK_K": depth, "num_warps": warps, "num_stages": stages}


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
    (n_rows, n_cols), vocab, shape = x.shape, len(weight), tiles(x)
    blocks, tiles_of_row = triton.cdiv(n_rows, shape["BLOCK_M"]), triton.cdiv(vocab, shape["BLOCK_N"])
    tokens = triton.cdiv(tiles_of_row, max(min(PROGRAMS // blocks, tiles_of_row), 1)) * shape["BLOCK_N"]
    parts = triton.cdiv(vocab, tokens)
    m_parts, l_parts = (empty_f32(x, parts, n_rows) for _ in range(2))
    target_logits, losses, stats = empty_f32(x, n_rows), empty_f32(x, n_rows), empty_f32(x, 3, n_rows)
    statistics_kernel[(blocks * parts,)](
        x, weight, targets, m_parts, l_parts, target_logits, n_rows, vocab, n_cols, tokens, **shape,
    )  # fmt: skip
    join_kernel[(triton.cdiv(n_rows, 256),)](
        m_parts, l_parts, target_logits, losses, stats, n_rows, parts, z_loss, BLOCK_SIZE=256, num_warps=4,
    )  # fmt: skip
    return losses, stats


def gradients(
    x: Tensor, weight: Tensor, targets: Tensor, stats: Tensor, scale: float, dx: Tensor | None, dweight: Tensor | None
) -> None:
    """Fills dx (rows, C) and dweight (V, C), where wanted."""
    (n_rows, n_cols), vocab, shape = x.shape, len(weight), tiles(x)
    most = max(CHUNK_BYTES // (vocab * x.element_size()), 64)
    chunk = triton.cdiv(n_rows, triton.cdiv(n_rows, most))
    before = max(scale, 1 / 1024)
    after = scale / before
    dlogits = x.new_empty(chunk, vocab)
    dweight_sum = None if dweight is None or chunk == n_rows else torch.zeros_like(weight, dtype=torch.float32)
    for start in range(0, n_rows, chunk):
        part = x[start : start + chunk]
        d = dlogits[: len(part)]
        grid = (triton.cdiv(len(part), shape["BLOCK_M"]) * triton.cdiv(vocab, shape["BLOCK_N"]),)
        dlogits_kernel[grid](x, weight, targets, stats, d, start, n_rows, len(part), vocab, n_cols, before, **shape)
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
    weight, (vocab, n_cols) = weight.contiguous(), weight.shape
    positions = kept(targets, ignore_index, vocab)
    n_rows = len(positions)
    dx = torch.zeros(len(x) if x_grad else 0, n_cols, dtype=x.dtype, device=x.device)
    dweight = weight.new_zeros(vocab if weight_grad else 0, n_cols)
    if not n_rows:
        return empty_f32(x).zero_(), dx, dweight
    few = n_rows < len(x)
    given, wanted = (x[positions], targets[positions]) if few else (x.contiguous(), targets.contiguous())
    losses, stats = statistics(given, weight, wanted, z_loss)
    scale = 1 / n_rows if mean else 1.0
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
