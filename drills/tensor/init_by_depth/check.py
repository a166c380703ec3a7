import math

import torch

from finetune.drills.cases import Case


def constant(x):
    return bool((x == x.flatten()[0]).all())


def described(x):
    """A tensor by what does not depend on the numbers drawn."""
    if constant(x):
        return f"all {float(x.flatten()[0]):g}"
    mean, std = float(x.double().mean()), float(x.double().std())
    steps = round(math.log(std / 0.02) / math.log(1.2))
    beyond = float((x.abs() > 2 * std).double().mean())
    shape = "normal" if 0.03 < beyond < 0.065 else "not normal"
    return f"{shape}, mean {'0' if abs(mean) < 0.06 * std else 'not 0'}, deviation about {0.02 * 1.2**steps:.2g}"


def drive(code, shapes, layers, seed):
    before = torch.get_rng_state()
    made, again, other = (code.initialize(shapes, layers, s) for s in (seed, seed, seed + 1))
    drawn = [x.flatten()[:50].tolist() for x in made.values() if not constant(x)]
    units = [[round(x / abs(row[0]), 3) for x in row] for row in drawn]
    return {
        "tensors": {name: described(x) for name, x in made.items()},
        "shapes": {name: (tuple(x.shape), str(x.dtype)) for name, x in made.items()},
        "the same again": all(torch.equal(made[name], again[name]) for name in made),
        "another seed, other numbers": any(not torch.equal(made[name], other[name]) for name in made) or not drawn,
        "two tensors alike": any(a == b for i, a in enumerate(units) for b in units[:i]),
        "default generator unchanged": torch.equal(before, torch.get_rng_state()),
    }


def cases(draw):
    def layer(i, d):
        names = {f"{i}.norm1.weight": (d,), f"{i}.qkv.weight": (3 * d, d), f"{i}.qkv.bias": (3 * d,)}
        names |= {f"{i}.attn.proj.weight": (d, d), f"{i}.attn.proj.bias": (d,), f"{i}.norm2.weight": (d,)}
        return names | {f"{i}.up.weight": (4 * d, d), f"{i}.mlp.proj.weight": (d, 4 * d), f"{i}.norm2.bias": (d,)}

    yield Case("a bias", [{"a.bias": (3,)}, 1, 0])
    yield Case("a norm", [{"norm.weight": (3,), "norm.bias": (3,)}, 1, 0])
    yield Case("one matrix", [{"up.weight": (256, 200)}, 1, 0])
    yield Case("one projection, two layers", [{"mlp.proj.weight": (200, 256)}, 2, 1])
    yield Case("one projection, 30 layers", [{"mlp.proj.weight": (200, 256)}, 30, 2])
    yield Case("an embedding and its bias", [{"wte.weight": (500, 100), "wte.bias": (100,)}, 3, 3])
    yield Case("matrices of one shape", [{f"{i}.up.weight": (200, 256) for i in range(3)}, 3, 4])
    yield Case("a layer", [layer(0, 96), 12, 5])
    yield Case("two layers", [layer(0, 96) | layer(1, 96), 2, 6])
