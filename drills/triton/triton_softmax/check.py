import torch

from finetune.drills.cases import Case


def reference(x):
    return torch.softmax(x, -1)


def cases(draw):
    for rows, columns in ((1, 1), (1, 3), (2, 4), (3, 31), (5, 100)):
        yield Case(f"{rows} rows of {columns}", [draw.normal(rows, columns, scale=2)])
    yield Case("numbers near 1e4", [draw.normal(2, 5) + 1e4])
    yield Case("numbers near −1e4", [draw.normal(2, 5) - 1e4])
    yield Case("bfloat16", [draw.normal(3, 33, dtype=torch.bfloat16)])
    yield Case("rows that are apart", [draw.normal(4, 40)[:, :17]])
