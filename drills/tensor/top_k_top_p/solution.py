"""The filters of sampling: top-k, top-p and min-p, with ties.

filtered(logits, k, p, min_p): logits (…, v) floating point → the same shape and type, −inf where a token is removed.
Three filters, one after another, each with the softmax of what the ones before it kept:
k (int, 0: off): keeps the logits that are at least the k-th largest, all that tie with it too; k may exceed v.
p (0 < p ≤ 1, 1: off, whatever rounding does): keeps a token if the probabilities of all strictly more probable tokens
sum to less than p. So the token that reaches p stays, and ties stay or go together.
min_p (0: off): keeps a token if its probability is at least min_p times the largest.
Logits of −inf stay −inf.

    >>> x = torch.tensor([2.0, 1.0, 1.0, 0.0])
    >>> filtered(x, k=2, p=1.0, min_p=0.0)
    tensor([2., 1., 1., -inf])
    >>> filtered(x, k=0, p=0.5, min_p=0.0), filtered(x, k=0, p=1.0, min_p=0.5)
    (tensor([2., -inf, -inf, -inf]), tensor([2., -inf, -inf, -inf]))
"""

import torch
from torch import Tensor


def filtered(logits: Tensor, k: int, p: float, min_p: float) -> Tensor:
    if 0 < k < logits.shape[-1]:
        least = logits.topk(k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if p < 1:
        ordered = logits.softmax(-1).sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        least = ordered.masked_fill(before >= p, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits.softmax(-1) < least, -torch.inf)
    if min_p > 0:
        probabilities = logits.softmax(-1)
        removed = probabilities < min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits.clone()
