"""Find the bug: accumulating over micro-batches trains otherwise than one large batch does.

accumulate(weight, inputs, targets, rows): weight (v, d), inputs (b, t, d) floating point, targets (b, t) int64, −100
where a token does not count; rows ≥ 1: how many rows of the batch go into a micro-batch (the last one may have fewer).
→ (loss, gradient): the cross entropy of inputs weightᵀ, as a mean over all tokens of the batch that count, without a
graph, and its gradient by weight, (v, d). Both are the same for every `rows`; both are 0 if no token counts.

    >>> targets = torch.tensor([[0, 0, 0], [1, -100, -100]])
    >>> loss, gradient = accumulate(torch.zeros(2, 1), torch.ones(2, 3, 1), targets, rows=1)
    >>> gradient
    tensor([[-0.2500],
            [ 0.2500]])
"""

from torch import Tensor
from torch.nn.functional import cross_entropy


def accumulate(weight: Tensor, inputs: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    weight = weight.detach().clone().requires_grad_()
    loss = weight.new_zeros(())
    tokens = max(int((targets != -100).sum()), 1)
    for x, labels in zip(inputs.split(rows), targets.split(rows), strict=True):
        logits = (x @ weight.T).flatten(0, 1)
        part = cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum") / tokens
        part.backward()
        loss += part.detach()
    assert weight.grad is not None
    return loss, weight.grad
