import torch

from finetune.drills.cases import Case


def reference(x, w, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w


def cases(draw):
    for rows, columns in ((1, 1), (1, 3), (2, 255), (2, 256), (3, 257), (2, 700)):
        yield Case(f"{rows} rows of {columns}", [draw.normal(rows, columns), draw.normal(columns), 1e-5])
    yield Case("small numbers", [draw.normal(2, 33, scale=1e-3), draw.normal(33), 1e-5])
    yield Case("a row of zeros", [torch.zeros(1, 40), draw.normal(40), 1e-5])
    yield Case("bfloat16", [draw.normal(3, 300, dtype=torch.bfloat16), draw.normal(300, dtype=torch.bfloat16), 1e-5])
