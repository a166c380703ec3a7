"""Find the bug: a language model trains well and generates nonsense.

examples(ids, length): ids (n,) int64 → (inputs, labels), both (m, length) int64: the text cut into m pieces of `length`
tokens, one after another; a rest without a label for each of its tokens is dropped. labels holds the token that follows
each token of inputs, also at the end of a piece.
loss(logits, labels): logits (m, length, v), the model's output for inputs; labels as above → a scalar, the mean cross
entropy of the next token over all places. After the token inputs[i, j], a model that puts all weight on labels[i, j]
has loss 0.

    >>> inputs, labels = examples(torch.arange(6), length=2)
    >>> labels
    tensor([[1, 2],
            [3, 4]])
    >>> loss(100.0 * torch.nn.functional.one_hot(labels, 6), labels)
    tensor(0.)
"""

import torch
from torch import Tensor


def examples(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    pieces = (len(ids) - 1) // length
    inputs = ids[: pieces * length].view(pieces, length)
    labels = ids[1 : pieces * length + 1].view(pieces, length)
    return inputs, labels


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
