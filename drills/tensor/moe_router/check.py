import torch

from finetune.drills.cases import Case


def drive(code, logits, k, capacity):
    return dict(zip(("experts", "weights", "slots", "balance"), code.route(logits, k, capacity), strict=True))


def cases(draw):
    yield Case("one token, two experts", [draw.normal(1, 2), 1, 1])
    yield Case("one token, two of three experts", [draw.normal(1, 3), 2, 1])
    yield Case("equal logits", [torch.tensor([[1.0, 3.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), 3, 2])
    yield Case("one expert for all", [torch.tensor([[3.0, 1.0], [3.0, 0.0], [4.0, 0.0]]), 1, 2])
    logits = torch.tensor([[3.0, 2.0, 0.0], [1.0, 2.0, 0.5], [0.0, 4.0, 3.0]])
    yield Case("a second choice of an early token against first choices", [logits, 2, 2])
    yield Case("both choices of a token dropped", [torch.tensor([[3.0, 2.0], [2.0, 3.0], [3.0, 1.0]]), 2, 1])
    yield Case("all experts chosen", [draw.normal(4, 3), 3, 3])
    yield Case("room for everyone", [draw.normal(7, 4), 2, 14])
    yield Case("large logits", [draw.normal(6, 4, scale=30), 2, 3], length=100_000)
    yield Case("not contiguous", [draw.strided(7, 5), 2, 2])
    yield Case("67 tokens, 8 experts", [draw.normal(67, 8), 2, 17])
