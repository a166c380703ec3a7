import torch

from finetune.drills.cases import Case


def reference(x, tanh=False):
    x = x.clone().requires_grad_()
    y = torch.nn.functional.gelu(x, approximate="tanh" if tanh else "none")
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def cases(draw):
    for tanh in (False, True):
        how = {"tanh": tanh}
        name = "with tanh" if tanh else "exact"
        yield Case(f"one number, {name}", [draw.normal(1)], how, length=100)
        yield Case(f"three numbers, {name}", [torch.tensor([-1.0, 0.0, 2.0])], how, length=100)
        yield Case(f"from −4 to 4, {name}", [torch.linspace(-4, 4, 33)], how, length=100)
        yield Case(f"numbers of ±1e4, {name}", [torch.tensor([-1e4, -100.0, 100.0, 1e4])], how)
        yield Case(f"two dimensions, {name}", [draw.normal(5, 13, scale=2)], how, length=100)
        yield Case(f"not contiguous, {name}", [draw.strided(5, 13)], how, length=100)
