"""The Kullback-Leibler divergence of two distributions given by logits, in both directions.

p and q (…, n), logits → (KL(p‖q), KL(q‖p)), each (…), in nats: KL(p‖q) = Σ p·(log p − log q) with softmax over the last
dimension. Logits as large as ±1e4 must work. A logit may be −inf (a token that cannot occur), but not all of a row:
where the first distribution is 0 the term is 0, and where only the second is 0 the divergence is inf.

    >>> kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 0.0]))
    (tensor(0.8554), tensor(0.5023))
    >>> kl_divergence(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 0.0]))
    (tensor(0.6931), tensor(inf))
"""

import torch
from torch import Tensor


def kl_divergence(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    logp = p - p.logsumexp(-1, keepdim=True)
    logq = q - q.logsumexp(-1, keepdim=True)
    return one_way(logp, logq), one_way(logq, logp)


def one_way(a: Tensor, b: Tensor) -> Tensor:
    terms = a.exp() * (a - b)
    return torch.where(a == -torch.inf, torch.zeros_like(a), terms).sum(-1)
