import torch

from finetune.drills.cases import Case


def cases(draw):
    inf = torch.inf
    yield Case("two tokens", [draw.normal(2), draw.normal(2)])
    yield Case("three tokens", [draw.normal(3), draw.normal(3)])
    yield Case("two rows", [draw.normal(2, 5), draw.normal(2, 5)])
    yield Case(
        "one of two rows alike", [torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 2.0], [1.0, 0.0]])]
    )
    yield Case("p cannot give the second", [torch.tensor([1.0, -inf, 0.0]), draw.normal(3)])
    yield Case("q cannot give the first", [draw.normal(3), torch.tensor([-inf, 0.0, 1.0])])
    yield Case("neither can give the last", [torch.tensor([1.0, 0.0, -inf]), torch.tensor([0.0, 0.5, -inf])])
    yield Case("logits near 1e4", [draw.normal(4, 3, scale=3) + 1e4, draw.normal(4, 3, scale=3) - 1e4], length=10_000)
    yield Case("far apart", [torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([[-200.0, 0.0, 200.0]])])
    yield Case("three dimensions", [draw.normal(2, 3, 7), draw.normal(2, 3, 7)])
    yield Case("not contiguous", [draw.strided(5, 13), draw.strided(5, 13)])
    yield Case("1009 tokens", [draw.normal(3, 1009), draw.normal(3, 1009)])
