import torch

from finetune.drills.cases import Case
from finetune.drills.compiled import launch

LIMITS = {"requests": 260}


def drive(code, w, scale, x):
    return launch(code, [w, scale, x], [(len(w),)], w.shape)


def reference(w, scale, x):
    return (w.double() @ x) * scale


def cases(draw):
    for rows, columns in ((1, 4), (2, 8), (3, 128), (5, 132), (4, 260), (9, 516)):
        weights = draw.integers(128, rows, columns, low=-128).to(torch.int8)
        yield Case(f"{rows} rows of {columns}", [weights, draw.uniform(rows, low=0.01), draw.normal(columns)],
                   length=columns * 16)  # fmt: skip
    weights = draw.integers(128, 8, 512, low=-128).to(torch.int8)
    yield Case("8 rows of 512", [weights, draw.uniform(8, low=0.01), draw.normal(512)], length=8192)
