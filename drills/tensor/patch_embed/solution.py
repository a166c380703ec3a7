"""The patches of an image as tokens, and back.

patch_embed(images, weight, bias): images (b, c, h, w), weight (d, c, p, p), bias (d,), floating point; h and w are
multiples of p → (b, h / p · w / p, d): the patches row by row from the top left, each the product with weight over
channel, row and column, plus bias. Do not call a convolution.
unpatchify(patches, c, p, w): patches (b, n, c · p · p) in the same order, the numbers of a patch by channel, then row,
then column; w the width of the image → (b, c, h, w).

    >>> image = torch.arange(8.0).view(1, 1, 2, 4)
    >>> patch_embed(image, torch.tensor([[[[1.0, 0.0], [0.0, 10.0]]]]), torch.zeros(1)).flatten()
    tensor([50., 72.])
    >>> unpatchify(torch.tensor([[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]), c=1, p=2, w=4).equal(image)
    True
"""

from torch import Tensor


def patch_embed(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    b, c, h, w = images.shape
    d, _, p, _ = weight.shape
    patches = images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // p) * (w // p), c * p * p) @ weight.reshape(d, c * p * p).T + bias


def unpatchify(patches: Tensor, c: int, p: int, w: int) -> Tensor:
    b, n, _ = patches.shape
    columns = w // p
    rows = n // columns
    return patches.reshape(b, rows, columns, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, rows * p, w)
