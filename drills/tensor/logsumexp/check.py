import torch

from finetune.drills.cases import Case


def reference(x):
    return torch.logsumexp(x, -1)


def cases(draw):
    yield Case("one number", [draw.normal(1)], grad=True)
    yield Case("three numbers", [draw.normal(3)], grad=True)
    yield Case("two rows", [draw.normal(2, 5, scale=3)], grad=True)
    yield Case("numbers near 1e4", [draw.normal(2) + 1e4])
    yield Case("numbers near −1e4", [draw.normal(3) - 1e4])
    yield Case("a row in part −inf", [torch.tensor([[0.0, -torch.inf, 1.0]])])
    yield Case("a row of nothing but −inf", [torch.tensor([[-torch.inf, -torch.inf], [1.0, 2.0]])])
    yield Case("+inf in a row", [torch.tensor([[torch.inf, 0.0], [1.0, 2.0]])])
    yield Case("two rows far apart", [torch.tensor([[500.0, 501.0], [0.0, 1.0]])])
    yield Case("three dimensions", [draw.normal(2, 3, 7)], grad=True)
    yield Case("bfloat16", [draw.normal(3, 17, dtype=torch.bfloat16)])
    yield Case("not contiguous", [draw.strided(5, 13)], grad=True)
    yield Case("a long row", [draw.normal(1, 4099)])
