import torch

from finetune.drills.cases import Case


def reference(a, b):
    return a @ b


def cases(draw):
    for m, n, k in ((1, 1, 1), (2, 3, 2), (32, 32, 16), (33, 31, 17), (5, 70, 40)):
        yield Case(f"{m} × {n} × {k}", [draw.normal(m, k), draw.normal(k, n)], length=k)
    yield Case("A transposed", [draw.normal(20, 33).T, draw.normal(20, 35)], length=20)
    yield Case("B transposed", [draw.normal(33, 20), draw.normal(35, 20).T], length=20)
    parts = [draw.normal(40, 48, dtype=torch.bfloat16), draw.normal(48, 40, dtype=torch.bfloat16)]
    yield Case("bfloat16", parts, length=48)
