"""GPT-2's initialization, in which what is added to the residual stream shrinks with depth.

initialize(shapes, layers, seed) → a dict of fp32 tensors of the names and shapes in `shapes`. Names that end with .bias
are zeros; names with "norm" in them that end with .weight are ones; names that end with proj.weight are normal with
mean 0 and deviation 0.02 / √(2·layers), as every layer adds to the residual stream twice; all others are normal with
mean 0 and deviation 0.02.

The same seed gives the same tensors, another seed others; no two tensors hold the same numbers, and torch's default
generator is left as it was.

    >>> made = initialize({"mlp.proj.weight": (400, 400), "mlp.proj.bias": (400,)}, layers=8, seed=0)
    >>> round(float(made["mlp.proj.weight"].std()), 4), float(made["mlp.proj.bias"].abs().max())
    (0.005, 0.0)
"""

import torch
from torch import Tensor


def initialize(shapes: dict[str, tuple[int, ...]], layers: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        if name.endswith(".bias"):
            found[name] = torch.zeros(shape)
        elif "norm" in name:
            found[name] = torch.ones(shape)
        else:
            deviation = 0.02 / (2 * layers) ** 0.5 if name.endswith("proj.weight") else 0.02
            found[name] = torch.randn(shape, generator=generator) * deviation
    return found
