import torch

from finetune.drills.cases import Case


def reference(logits, targets, epsilon):
    total = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=epsilon, reduction="sum")
    return total / max(int((targets != -100).sum()), 1)


def cases(draw):
    yield Case("one row of one token", [draw.normal(1, 1) + 1, torch.tensor([0]), 0.1])
    yield Case("one row", [draw.normal(1, 3), torch.tensor([2]), 0.1], grad=True)
    yield Case("two rows", [draw.normal(2, 3), torch.tensor([0, 2]), 0.1], grad=True)
    yield Case("ε = 0", [draw.normal(2, 3), torch.tensor([0, 2]), 0.0], grad=True)
    yield Case("ε = 1", [draw.normal(2, 5), torch.tensor([0, 2]), 1.0], grad=True)
    yield Case("one of two ignored", [draw.normal(2, 4), torch.tensor([-100, 1]), 0.2], grad=True)
    yield Case("all ignored", [draw.normal(2, 3), torch.tensor([-100, -100]), 0.1], grad=True)
    yield Case("logits near 1e4", [draw.normal(4, 3) + 1e4, torch.tensor([1, 0, 2, 2]), 0.1])
    yield Case("an improbable token", [torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([0]), 0.1])
    targets = draw.integers(101, 37)
    targets[draw.flags(37, share=0.3)] = -100
    yield Case("37 rows of 101", [draw.normal(37, 101, scale=2), targets, 0.1], grad=True)
    yield Case("not contiguous", [draw.strided(5, 7), draw.integers(7, 5), 0.3], grad=True)
