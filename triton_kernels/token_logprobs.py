"""Log-probabilities of given tokens and the entropies of their distributions, without the (N, V) log-softmax:

    z = logits / temperature      top = max z      e = exp(z − top)      p = e / Σ e
    logprob = z_t − top − log Σ e      entropy = log Σ e − Σ p · (z − top)
    dz_j = dlogprob · ([j = t] − p_j) − dentropy · p_j · (log p_j + entropy)

Layout: (N, V) with any stride between rows; a program owns ROWS rows and sweeps V in blocks, with a running maximum
that rescales both sums (Milakov & Gimelshein 2018, arXiv:1805.02867). Backward keeps top and log Σ e, and takes one
sweep. A target outside the vocabulary makes its row NaN.
Bytes, times the dtype's size: 1 a logit forward, 2 backward (read, write). FLOPs: 12 and 15, an exponential in each.
Intensity: 6 FLOP/byte in bf16, left of the ridge; the roof is memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, check, empty_f32, tile


@triton.jit
def token_logprobs_kernel(
    logits, targets, logprobs, entropies, stats, rows, vocab, stride, ignore_index, inverse_temperature,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    best = tl.full([ROWS], float("-inf"), tl.float32)
    sums, products = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, vocab, BLOCK):
        word = first + tl.arange(0, BLOCK)
        inside = here[:, None] & (word < vocab)[None, :]
        z = tl.load(logits + row[:, None] * stride + word[None, :], mask=inside, other=float("-inf"))
        z = z.to(tl.float32) * inverse_temperature
        best_now = tl.maximum(best, tl.max(z, 1))
        shift = tl.where(best_now == float("-inf"), 0.0, best_now)
        below = z - shift[:, None]
        e = tl.exp(below)
        fall = tl.where(best == float("-inf"), 0.0, best - shift)
        decay = tl.exp(fall) * (best > float("-inf"))
        products = decay * (products + sums * fall) + tl.sum(tl.where(e > 0, e * below, 0.0), 1)
        sums = sums * decay + tl.sum(e, 1)
        best = best_now
    log_sum = tl.log(sums)
    target = tl.load(targets + row, mask=here, other=ignore_index)
    counted = target != ignore_index
    known = (target >= 0) & (target < vocab)
    z = tl.load(logits + row * stride + target, mask=here & counted & known, other=0.0).to(tl.float32)
    logprob = z * inverse_temperature - best - log_sum
    tl.store(logprobs + row, tl.where(counted, tl.where(known, logprob, float("nan")), 0.0), mask=here)
    tl.store(stats + row, tl.where(known, best, float("nan")), mask=here)
    tl.store(stats + rows + row, log_sum, mask=here)
    if ENTROPY:
        entropy = tl.where(known, log_sum - products / sums, float("nan"))
        tl.store(entropies + row, tl.where(counted, entropy, 0.0), mask=here)


@triton.jit
def token_logprobs_backward_kernel(
    dlogprobs, dentropies, logits, targets, entropies, stats, dlogits, rows, vocab, stride, ignore_index,
    inverse_temperature, LOGPROBS: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    inside = here[:, None] & (word < vocab)[None, :]
    target = tl.load(targets + row, mask=here, other=ignore_index)
    counted = target != ignore_index
    z = tl.load(logits + row[:, None] * stride + word[None, :], mask=inside, other=float("-inf"))
    top = tl.load(stats + row, mask=here, other=0.0)
    logp = z.to(tl.float32) * inverse_temperature - top[:, None]
    logp -= tl.load(stats + rows + row, mask=here, other=0.0)[:, None]
    p = tl.exp(logp)
    dz = tl.zeros([ROWS, BLOCK], tl.float32)
    if LOGPROBS:
        d = tl.load(dlogprobs + row, mask=here, other=0.0)
        dz += d[:, None] * ((word[None, :] == target[:, None]).to(tl.float32) - p)
    if ENTROPY:
        d = tl.load(dentropies + row, mask=here, other=0.0)
        entropy = tl.load(entropies + row, mask=here, other=0.0)
        dz -= d[:, None] * tl.where(p == 0, 0.0, p * (logp + entropy[:, None]))
    dz = tl.where(counted[:, None], dz * inverse_temperature, 0.0)
    tl.store(dlogits + row[:, None] * vocab + word[None, :], dz, mask=inside)


def checked(logits: Tensor, targets: Tensor) -> tuple[Tensor, int, Tensor]:
    check(logits.dim() == 2, "token_logprobs", "logits must be (N, V)")
    fits = targets.shape == logits.shape[:1] and targets.dtype == torch.int64
    check(fits, "token_logprobs", "targets must be (N,) int64 for logits (N, V)")
    return *as_rows(logits), targets.contiguous()


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    given, stride, targets = checked(logits, targets)
    rows, vocab = logits.shape
    logprobs, entropies, stats = (empty_f32(logits, *size) for size in ((rows,), (rows if entropy else 0,), (2, rows)))
    if rows:
        shape = tile(rows, vocab, 4096, 4096)
        token_logprobs_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
            given, targets, logprobs, entropies, stats, rows, vocab, stride, ignore_index, 1 / temperature,
            ENTROPY=entropy, **shape,
        )  # fmt: skip
    return logprobs, entropies, stats


def token_logprobs_backward(
    dlogprobs: Tensor | None, dentropies: Tensor | None, logits: Tensor, targets: Tensor, entropies: Tensor,
    stats: Tensor, temperature: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    given, stride, targets = checked(logits, targets)
    rows, vocab = logits.shape
    dlogits = logits.new_empty(logits.shape)
    if dlogits.numel():
        shape = tile(rows, vocab)
        grads = [stats if d is None else d.contiguous() for d in (dlogprobs, dentropies)]
        grid = (triton.cdiv(rows, shape["ROWS"]) * triton.cdiv(vocab, shape["BLOCK"]),)
        token_logprobs_backward_kernel[grid](
            *grads, given, targets, entropies, stats, dlogits, rows, vocab, stride, ignore_index, 1 / temperature,
            LOGPROBS=dlogprobs is not None, ENTROPY=dentropies is not None, **shape,
        )  # fmt: skip
    return dlogits


OPERATORS = {"token_logprobs": token_logprobs, "token_logprobs_backward": token_logprobs_backward}


def typical(dtype: torch.dtype):
    logits, targets = torch.empty(64, 49152, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    stat = empty_f32(logits, 64)
    for entropy in (False, True):
        yield "token_logprobs", (logits, targets, 1.0, -100, entropy)
        grads = (stat, stat if entropy else None)
        yield "token_logprobs_backward", (*grads, logits, targets, stat, empty_f32(logits, 2, 64), 1.0, -100)
