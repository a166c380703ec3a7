import torch

from finetune.drills.cases import Case
from finetune.drills.compiled import launch


def drive(code, x):
    return launch(code, [x], [((256,), torch.int32)], [len(x)])


def reference(x):
    return torch.bincount(x, minlength=256).int()


def cases(draw):
    for n in (1, 2, 3, 255, 256, 257, 1000):
        yield Case(f"{n} numbers", [draw.integers(256, n).int()])
    yield Case("the same number always", [torch.full((1030,), 7, dtype=torch.int32)])
    yield Case("2,000 numbers of 0 to 3", [draw.integers(4, 2000).int()])
