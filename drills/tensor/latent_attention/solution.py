"""Multi-head latent attention (DeepSeek-V2) over a cache of latents, with absorbed projections.

The cache holds for each of tk tokens a latent (tk, r) and one rotated key that all heads share, k_rope (tk, dr). Head
h's key is w_k[h] applied to the latent, followed by k_rope; its value is w_v[h] applied to the latent.
q_nope (tq, h, dn), q_rope (tq, h, dr) (already rotated), w_k (h, dn, r), w_v (h, dv, r), tq ≤ tk → (tq, h, dv):
causal attention, query i sees the tokens j ≤ i + tk − tq, scores divided by √(dn + dr).

Keys and values of the heads may not be built, w_k goes to the query and w_v to the result: with one query and 64 tokens
no tensor may have more elements than the cache (latents and k_rope together) or w_k, whichever is more. Gradients must
be right too (autograd may make them).

    >>> latents, k_rope = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [100.0]])
    >>> q_nope, q_rope = torch.zeros(2, 1, 1), torch.tensor([[[1.0]], [[1.0]]])
    >>> latent_attention(q_nope, q_rope, latents, k_rope, torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0)).flatten()
    tensor([2., 6.])
"""

import torch
from torch import Tensor


def latent_attention(
    q_nope: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor
) -> Tensor:
    tq, tk = len(q_nope), len(latents)
    scale = (q_nope.shape[2] + q_rope.shape[2]) ** -0.5
    queries = q_nope.transpose(0, 1) @ w_k  # (h, tq, r): what the heads ask of a latent
    scores = (queries @ latents.T + q_rope.transpose(0, 1) @ k_rope.T) * scale
    hidden = torch.ones(tq, tk, dtype=torch.bool, device=scores.device).triu(tk - tq + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ latents @ w_v.mT).transpose(0, 1)
