"""Several documents in one row, none of which sees another.

documents: a list of lists of token ids, maybe empty ones, whose lengths sum to at most `size`. → a tuple of

ids (size,) int64: the documents one after another, then zeros (padding);
labels (size,) int64: the token that follows in the same document; −100 at the last token of a document and at padding;
positions (size,) int64: 0, 1, 2, … in every document; 0 at padding;
mask (size, size) bool: query i sees key j, which is in the same document and not after it. Padding sees nothing, not
even itself, and nothing sees it.

    >>> ids, labels, positions, mask = pack([[5, 6], [7]], size=4)
    >>> labels, positions
    (tensor([   6, -100, -100, -100]), tensor([0, 1, 0, 0]))
    >>> mask.int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 0, 0]], dtype=torch.int32)
"""

import torch
from torch import Tensor


def pack(documents: list[list[int]], size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids, positions = torch.zeros(2, size, dtype=torch.int64)
    labels, owner = torch.full((size,), -100), torch.full((size,), -1)
    at = 0
    for number, document in enumerate(documents):
        here = slice(at, at + len(document))
        ids[here] = torch.tensor(document, dtype=torch.int64)
        positions[here] = torch.arange(len(document))
        owner[here] = number
        at += len(document)
    follows = (owner[1:] == owner[:-1]) & (owner[1:] >= 0)
    labels[:-1] = torch.where(follows, ids[1:], -100)
    same = (owner[:, None] == owner) & (owner >= 0)
    return ids, labels, positions, same.tril()
