import torch

from finetune.drills.cases import Case
from finetune.drills.compiled import launch


def drive(code, x, k):
    rows = len(x)
    return launch(code, [x], [(rows, k), ((rows, k), torch.int32)], [*x.shape, k])


def reference(x, k):
    values, indices = torch.sort(x, dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k].int()


def cases(draw):
    yield Case("one number", [draw.normal(1, 1), 1])
    yield Case("two equal numbers", [torch.tensor([[1.0, 1.0]]), 2])
    yield Case("equal numbers in one lane", [torch.tensor([[0.0] * 3 + [2.0] + [0.0] * 31 + [2.0]]), 2])
    yield Case("−inf among them", [torch.tensor([[-torch.inf, -1.0, -torch.inf]]), 3])
    for rows, columns, k in ((2, 3, 2), (1, 31, 5), (5, 33, 8), (3, 100, 3), (2, 256, 8)):
        yield Case(f"{k} of {columns}", [draw.normal(rows, columns), k])
    yield Case("many equal numbers", [draw.integers(4, 6, 200).float(), 16])
