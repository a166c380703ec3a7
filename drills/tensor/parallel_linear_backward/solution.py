"""A tensor-parallel MLP: the first layer split by columns, the second by rows, with their gradients by hand.

mlp(x, ups, downs, bias, dy, all_reduce): n ranks in one process. x (t, d) and dy (t, d) are the same on every rank;
rank r has ups[r] (h_r, d), downs[r] (d, h_r); bias (d,) is the same on every rank. The ranks' h_r may differ.
y = Σ_r relu(x ups[r]ᵀ) downs[r]ᵀ + bias. → a dict of lists with an item for each rank (rank r's own result):
"y" (t, d); "dx" (t, d), "dups" and "ddowns" (of the shapes of ups[r] and downs[r]) and "dbias" (d,): the gradients of
the sum of y · dy. Relu has gradient 0 at 0. Do not call autograd.
Ranks share numbers only by all_reduce(list with a tensor for each rank), which returns such a list with the sum in
every item. It is called twice: once for y, once for dx.

    >>> def all_reduce(tensors):
    ...     return [sum(tensors)] * len(tensors)
    >>> one = torch.ones(1, 1)
    >>> found = mlp(one, [one, 2 * one], [one, one], torch.ones(1), one, all_reduce)
    >>> found["y"], found["dx"], found["dups"][1]
    ([tensor([[4.]]), tensor([[4.]])], [tensor([[3.]]), tensor([[3.]])], tensor([[1.]]))
"""

from collections.abc import Callable

from torch import Tensor

AllReduce = Callable[[list[Tensor]], list[Tensor]]


def mlp(
    x: Tensor, ups: list[Tensor], downs: list[Tensor], bias: Tensor, dy: Tensor, all_reduce: AllReduce
) -> dict[str, list[Tensor]]:
    hidden = [(x @ up.T).relu() for up in ups]
    sums = all_reduce([h @ down.T for h, down in zip(hidden, downs, strict=True)])
    dhidden = [(dy @ down) * (h > 0) for h, down in zip(hidden, downs, strict=True)]
    dx = all_reduce([dh @ up for dh, up in zip(dhidden, ups, strict=True)])
    return {
        "y": [each + bias for each in sums],
        "dx": dx,
        "dups": [dh.T @ x for dh in dhidden],
        "ddowns": [dy.T @ h for h in hidden],
        "dbias": [dy.sum(0) for _ in ups],
    }
