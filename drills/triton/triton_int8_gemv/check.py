import torch

from finetune.drills.cases import Case


def reference(w, scale, x):
    return (w.double() @ x) * scale


def cases(draw):
    for rows, columns in ((1, 1), (2, 3), (7, 63), (8, 64), (9, 65), (20, 150)):
        weights = draw.integers(128, rows, columns, low=-128).to(torch.int8)
        parts = [weights, draw.uniform(rows, low=0.01), draw.normal(columns)]
        yield Case(f"{rows} rows of {columns}", parts, length=columns * 16)
