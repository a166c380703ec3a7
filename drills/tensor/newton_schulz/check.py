import torch

from finetune.drills.cases import Case, Largest


def drive(code, g, steps=5, memory=False):
    with Largest() as most:
        found = code.newton_schulz(g, steps)
    return {"result": found, "a tensor larger than g": most.elements > g.numel()} if memory else found


def reference(g, steps=5, memory=False):
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    s = s / (s.square().sum().sqrt() + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = (u * s) @ v
    return {"result": found, "a tensor larger than g": False} if memory else found


def cases(draw):
    yield Case("one number", [torch.tensor([[-2.0]])], {"steps": 1}, length=1000)
    yield Case("two by two, one step", [draw.normal(2, 2)], {"steps": 1}, length=1000)
    yield Case("two by two, two steps", [draw.normal(2, 2)], {"steps": 2}, length=1000)
    yield Case("two by three", [draw.normal(2, 3)], length=100_000)
    yield Case("five by three", [draw.normal(5, 3)], length=100_000)
    yield Case("small numbers", [draw.normal(3, 4, scale=1e-6)], {"steps": 3}, length=100_000)
    yield Case("large numbers", [draw.normal(3, 4, scale=1e6)], length=100_000)
    yield Case("zeros", [torch.zeros(2, 3)])
    yield Case("rank one", [draw.normal(4, 1) @ draw.normal(1, 3)], {"steps": 3}, length=100_000)
    yield Case("not contiguous", [draw.strided(4, 7)], length=100_000)
    yield Case("memory: 64 by 4", [draw.normal(64, 4)], {"memory": True}, length=100_000)
    yield Case("memory: 4 by 64", [draw.normal(4, 64)], {"memory": True}, length=100_000)
    yield Case("37 by 53", [draw.normal(37, 53)], length=1_000_000)
