"""Image features in the place of placeholder tokens.

scatter(embeddings, ids, placeholder, features): embeddings (b, t, d) floating point, ids (b, t) int64, placeholder an
int, features (n, d) floating point → (b, t, d) of embeddings' type: at the places whose id is placeholder the rows of
features, in order, row after row of the batch; the embedding elsewhere. Gradients flow into features and into the
embeddings that stay; the embeddings that are replaced have gradient 0. The input is not changed.
ValueError if the number of placeholders is not n.

    >>> embeddings = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> scatter(embeddings, torch.tensor([[9, 5, 9]]), 9, torch.tensor([[-1.0], [-2.0]])).flatten()
    tensor([-1.,  2., -2.])
"""

from torch import Tensor


def scatter(embeddings: Tensor, ids: Tensor, placeholder: int, features: Tensor) -> Tensor:
    here = ids == placeholder
    if int(here.sum()) != len(features):
        raise ValueError(f"{int(here.sum())} placeholders for {len(features)} features")
    result = embeddings.clone()
    result[here] = features.to(embeddings.dtype)
    return result
