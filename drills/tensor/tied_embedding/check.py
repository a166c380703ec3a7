import torch

from finetune.drills.cases import Case


def reference(tokens, targets, embedding):
    e = embedding.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(e[tokens] @ e.T, targets)
    return loss.detach(), torch.autograd.grad(loss, e)[0]


def cases(draw):
    yield Case("one position, two tokens", [torch.tensor([0]), torch.tensor([1]), draw.normal(2, 1)], length=100)
    yield Case("one position, three tokens", [torch.tensor([2]), torch.tensor([0]), draw.normal(3, 2)], length=100)
    yield Case("the target is the token", [torch.tensor([1]), torch.tensor([1]), draw.normal(3, 2)], length=100)
    yield Case("two positions", [torch.tensor([0, 3]), torch.tensor([1, 2]), draw.normal(4, 3)], length=100)
    yield Case("a token twice", [torch.tensor([1, 1]), torch.tensor([0, 2]), draw.normal(3, 3)], length=100)
    yield Case(
        "logits of 1e4", [torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2]), draw.normal(3, 4, scale=70)], length=100
    )
    yield Case("not contiguous", [draw.integers(7, 5), draw.integers(7, 5), draw.strided(7, 6)], length=100)
    yield Case(
        "67 positions of 31 tokens", [draw.integers(31, 67), draw.integers(31, 67), draw.normal(31, 16)], length=200
    )
