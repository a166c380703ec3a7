import torch

from finetune.drills.cases import Case


def reference(logits, targets):
    x = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, targets, reduction="sum") / max(int((targets != -100).sum()), 1)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def cases(draw):
    yield Case("one row", [draw.normal(1, 3), torch.tensor([2])])
    yield Case("two rows", [draw.normal(2, 3), torch.tensor([0, 2])])
    yield Case("one of two ignored", [draw.normal(2, 3), torch.tensor([-100, 1])])
    yield Case("all ignored", [draw.normal(2, 3), torch.tensor([-100, -100])])
    yield Case("logits near 1e4", [draw.normal(2, 3) + 1e4, torch.tensor([1, 0])])
    yield Case("an improbable target", [torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([2])])
    targets = draw.integers(101, 37)
    targets[draw.flags(37, share=0.3)] = -100
    yield Case("37 rows of 101", [draw.normal(37, 101, scale=2), targets])
    yield Case("not contiguous", [draw.strided(5, 7), draw.integers(7, 5)])
