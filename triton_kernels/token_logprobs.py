"""Log-probabilities of given tokens and the entropies of their distributions, without the (N, V) log-softmax:

    z = logits / temperature      m = max z      e = exp(z − m)      l = Σ e      p = e / l
    logprob = z_t − m − log l      entropy = log l − Σ p · (z − m)
    dz_j = dlogprob · ([j = t] − p_j) − dentropy · p_j · (log p_j + entropy)

Layout: (N, V) with any stride between rows; a program owns BLOCK_ROWS rows and sweeps V in blocks, with a running
maximum that rescales both sums (Milakov & Gimelshein 2018, arXiv:1805.02867). Backward keeps m and log l, and takes one
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
    logits, targets, logprobs, entropies, stats, n_rows, vocab, stride, ignore_index, inverse_temperature,
    ENTROPY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = row < n_rows
    m = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    l, products = tl.zeros([BLOCK_ROWS], tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, vocab, BLOCK_SIZE):
        token = first + tl.arange(0, BLOCK_SIZE)
        inside = here[:, None] & (token < vocab)[None, :]
        z = tl.load(logits + row[:, None] * stride + token[None, :], mask=inside, other=float("-inf"))
        z = z.to(tl.float32) * inverse_temperature
        m_new = tl.maximum(m, tl.max(z, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        below = z - shift[:, None]
        e = tl.exp(below)
        fall = tl.where(m == float("-inf"), 0.0, m - shift)
        alpha = tl.exp(fall) * (m > float("-inf"))
        products = alpha * (products + l * fall) + tl.sum(tl.where(e > 0, e * below, 0.0), 1)
        l = l * alpha + tl.sum(e, 1)
        m = m_new
    log_sum = tl.log(l)
    target = tl.load(targets + row, mask=here, other=ignore_index)
    counted = target != ignore_index
    known = (target >= 0) & (target < vocab)
    z = tl.load(logits + row * stride + target, mask=here & counted & known, other=0.0).to(tl.float32)
    logprob = z * inverse_temperature - m - log_sum
    tl.store(logprobs + row, tl.where(counted, tl.where(known, logprob, float("nan")), 0.0), mask=here)
    tl.store(stats + row, tl.where(known, m, float("nan")), mask=here)
    tl.store(stats + n_rows + row, log_sum, mask=here)
    if ENTROPY:
        entropy = tl.where(known, log_sum - products / l, float("nan"))
        tl.store(entropies + row, tl.where(counted, entropy, 0.0), mask=here)


@triton.jit
def token_logprobs_backward_kernel(
    dlogprobs, dentropies, logits, targets, entropies, stats, dlogits, n_rows, vocab, stride, ignore_index,
    inverse_temperature,
    LOGPROBS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(vocab, BLOCK_SIZE)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = (tl.program_id(0) % tiles) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    here = row < n_rows
    inside = here[:, None] & (token < vocab)[None, :]
    target = tl.load(targets + row, mask=here, other=ignore_index)
    counted = target != ignore_index
    z = tl.load(logits + row[:, None] * stride + token[None, :], mask=inside, other=float("-inf"))
    m = tl.load(stats + row, mask=here, other=0.0)
    logp = z.to(tl.float32) * inverse_temperature - m[:, None]
    logp -= tl.load(stats + n_rows + row, mask=here, other=0.0)[:, None]
    p = tl.exp(logp)
    dz = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    if LOGPROBS:
        d = tl.load(dlogprobs + row, mask=here, other=0.0)
        dz += d[:, None] * ((token[None, :] == target[:, None]).to(tl.float32) - p)
    if ENTROPY:
        d = tl.load(dentropies + row, mask=here, other=0.0)
        entropy = tl.load(entropies + row, mask=here, other=0.0)
        dz -= d[:, None] * tl.where(p == 0, 0.0, p * (logp + entropy[:, None]))
    dz = tl.where(counted[:, None], dz * inverse_temperature, 0.0)
    tl.store(dlogits + row[:, None] * vocab + token[None, :], dz, mask=inside)


def checked(logits: Tensor, targets: Tensor) -> tuple[Tensor, int, Tensor]:
    check(logits.dim() == 2, "token_logprobs", "logits must be (N, V)")
    fits = targets.shape == logits.shape[:1] and targets.dtype == torch.int64
    check(fits, "token_logprobs", "targets must be (N,) int64 for logits (N, V)")
    return *as_rows(logits), targets.contiguous()


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    given, stride, targets = checked(logits, targets)
    n_rows, vocab = logits.shape
    sizes = (n_rows,), (n_rows if entropy else 0,), (2, n_rows)
    logprobs, entropies, stats = (empty_f32(logits, *size) for size in sizes)
    if n_rows:
        shape = tile(n_rows, vocab, 4096, 4096)
        token_logprobs_kernel[(triton.cdiv(n_rows, shape["BLOCK_ROWS"]),)](
            given, targets, logprobs, entropies, stats, n_rows, vocab, stride, ignore_index, 1 / temperature,
            ENTROPY=entropy, **shape,
        )  # fmt: skip
    return logprobs, entropies, stats


def token_logprobs_backward(
    dlogprobs: Tensor | None, dentropies: Tensor | None, logits: Tensor, targets: Tensor, entropies: Tensor,
    stats: Tensor, temperature: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    given, stride, targets = checked(logits, targets)
    n_rows, vocab = logits.shape
    dlogits = logits.new_empty(logits.shape)
    if dlogits.numel():
        shape = tile(n_rows, vocab)
        grads = [stats if d is None else d.contiguous() for d in (dlogprobs, dentropies)]
        grid = (triton.cdiv(n_rows, shape["BLOCK_ROWS"]) * triton.cdiv(vocab, shape["BLOCK_SIZE"]),)
        token_logprobs_backward_kernel[grid](
            *grads, given, targets, entropies, stats, dlogits, n_rows, vocab, stride, ignore_index, 1 / temperature,
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
