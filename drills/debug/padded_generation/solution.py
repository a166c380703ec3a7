"""Find the bug: a batch of prompts gives other results than each prompt alone.

attend(x, wq, wk, wv, lengths): one causal attention head over a batch that is padded on the left. x (b, t, d), wq, wk,
wv (d, d), floating point; lengths (b,) int64: row r holds lengths[r] tokens, at its end; before them is padding, whose
numbers are arbitrary but finite. → (b, t, d): for each token the attention of softmax(q kᵀ / √d) v over the tokens of
its row up to itself; zeros at padding. So a row gives the same as it does without padding.

    >>> one = torch.ones(1, 1)
    >>> attend(torch.tensor([[[9.0], [2.0], [4.0]]]), 0 * one, one, one, torch.tensor([2]))
    tensor([[[0.],
             [2.],
             [3.]]])
"""

import torch
from torch import Tensor


def attend(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, lengths: Tensor) -> Tensor:
    t, d = x.shape[1:]
    q, k, v = x @ wq.T, x @ wk.T, x @ wv.T
    place = torch.arange(t, device=x.device)
    token = place >= t - lengths[:, None]
    causal = place[:, None] >= place
    visible = causal & token[:, None, :]
    scores = (q @ k.mT / d**0.5).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights @ v
