"""The gradient of an embedding that is also the output matrix, by hand.

tokens and targets (n,) int64, n ≥ 1, embedding (vocabulary, d) → (loss, gradient like embedding). The model is
h = embedding[tokens], logits = h embeddingᵀ, and loss the mean over the n positions of −log softmax(logits)[target].
The gradient adds up both uses of the matrix. Tokens may repeat; logits may be as large as ±1e4. Do not call autograd
or torch's cross_entropy.

    >>> tied_gradient(torch.tensor([0]), torch.tensor([0]), torch.tensor([[1.0], [0.0]]))
    (tensor(0.3133), tensor([[-0.5379],
            [ 0.2689]]))
"""

import torch
from torch import Tensor


def tied_gradient(tokens: Tensor, targets: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    h = embedding[tokens]
    logits = h @ embedding.T
    logs = logits - logits.logsumexp(-1, keepdim=True)
    index = targets[:, None]
    loss = -logs.gather(1, index).mean()
    dlogits = logs.exp().scatter_add(1, index, -torch.ones_like(logs[:, :1])) / len(tokens)
    gradient = dlogits.T @ h  # as the output matrix
    return loss, gradient.index_add(0, tokens, dlogits @ embedding)  # and as the embedding
