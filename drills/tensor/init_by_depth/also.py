import random

import torch


def initialize(shapes, layers, seed):
    draw = random.Random(seed)
    found = {}
    for name, shape in shapes.items():
        kind = name.rsplit(".", 1)[-1]
        if kind == "bias":
            found[name] = torch.full(shape, 0.0)
        elif kind == "weight" and "norm" in name:
            found[name] = torch.full(shape, 1.0)
        else:
            std = 0.02 * (2 * layers) ** -0.5 if name.endswith("proj.weight") else 0.02
            own = torch.Generator().manual_seed(draw.getrandbits(60))
            found[name] = torch.empty(shape).normal_(0.0, std, generator=own)
    return found
