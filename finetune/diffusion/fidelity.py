"""How close drawn images are to real ones: Fréchet distance, the one-nearest-neighbor test, and memorization.

No single number suffices. A Gaussian fitted to the data has the Fréchet distance 0 and draws nothing but blurs; a copy
of the training set passes everything except memorization. So each is shown next to its value for real against real
and for a Gaussian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.diffusion.images import Images


def pixels(x: Tensor) -> Tensor:
    """Images in units of a byte as rows (N, D) of values 0 to 16, the range of scikit-learn's digits, in float64."""
    return x.flatten(1).double() * (16 / 255)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to rows a (N, D) and b (M, D) (Dowson and Landau 1982):

        |μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^{1/2})

    With centered rows A and B, C_a = AᵀA / (n − 1): the trace of the root is the sum of the singular values of A Bᵀ
    over the square root of (n − 1) (m − 1), which are those of the product of their triangular factors. ValueError for
    fewer than two rows."""
    if min(len(a), len(b)) < 2:
        raise ValueError("frechet: a covariance needs at least two rows")
    a, b = a.double(), b.double()
    ra, rb = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b))
    cross = torch.linalg.svdvals(ra @ rb.T).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + ra.square().sum() + rb.square().sum() - 2 * cross)


def nearest_neighbor_two_sample(a: Tensor, b: Tensor) -> float:
    """Share of the rows of a and b (as many of each as the smaller has) whose nearest other row is from their own set
    (Lopez-Paz and Oquab 2017). 0.5: not to be told apart; 1: apart, or each its own copies; below 0.5: a copies b."""
    n = min(len(a), len(b))
    rows = torch.cat([a[:n], b[:n]]).double()
    distance = torch.cdist(rows, rows).fill_diagonal_(torch.inf)
    own = torch.arange(2 * n) < n
    return (own[distance.argmin(1)] == own).double().mean().item()


def memorization(samples: Tensor, train: Tensor, test: Tensor) -> tuple[float, float]:
    """Median over the samples, and over the test set, of the distance to the nearest training image (rows, squared
    Euclidean). Samples much nearer than the test set are copies."""
    train = train.double()
    near = [torch.cdist(rows.double(), train).min(1).values.square().median() for rows in (samples, test)]
    return float(near[0]), float(near[1])


def class_gaussian(train: Images, labels: Tensor, seed: int = 0) -> Tensor:
    """Images drawn from a Gaussian fitted to each class of `train`, for `labels` (N,): the baseline that knows two
    moments and nothing else. Floats in units of a byte, also outside 0 to 255: clipping would move the moments."""
    out = torch.empty(len(labels), *train.x.shape[1:], dtype=torch.float64)
    for label in labels.unique().tolist():
        at = labels == label
        out[at] = one_gaussian(train.x[train.labels == label], int(at.sum()), seed + label)
    return out


def one_gaussian(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """`count` images drawn from one Gaussian fitted to images x, as `class_gaussian`."""
    rows, generator = x.flatten(1).double(), torch.Generator().manual_seed(seed)
    if len(rows) > rows.shape[1]:
        values, vectors = torch.linalg.eigh(torch.atleast_2d(torch.cov(rows.T)))
        root = values.clamp(min=0).sqrt()[:, None] * vectors.T
    else:  # fewer images than pixels: the centered rows themselves are a root of their covariance
        root = (rows - rows.mean(0)) / max(len(rows) - 1, 1) ** 0.5
    unit = torch.randn(count, len(root), generator=generator, dtype=torch.float64)
    return (rows.mean(0) + unit @ root).reshape(-1, *x.shape[1:])


def fidelity(samples: Tensor, train: Images, test: Images, features: object = None) -> dict[str, float]:
    """All measures of `samples` (N, C, H, W), in units of a byte, against `test`, and memorization of `train`.

    features: of a judge, uint8 images → rows, adds `frechet_features`."""
    real = pixels(test.x)
    near, usual = memorization(pixels(samples), pixels(train.x), real)
    found = {
        "frechet": frechet(pixels(samples), real),
        "one_nn": nearest_neighbor_two_sample(pixels(samples), real),
        "memorization": near / max(usual, 1e-12),
    }
    if callable(features):
        found["frechet_features"] = frechet(features(samples), features(test.x))
    return found
