import torch

from finetune.drills.cases import Case


def reference(x, weight, dy, eps=1e-5):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    bias = torch.zeros_like(weight, requires_grad=True)
    y = torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return torch.autograd.grad(y, (x, weight, bias), dy)


def cases(draw):
    def made(*shape):
        return [draw.normal(*shape), draw.normal(shape[-1]), draw.normal(*shape)]

    yield Case("three numbers", made(3), length=100)
    yield Case("one row of five", made(1, 5), length=100)
    yield Case("two rows of five", made(2, 5), length=100)
    yield Case("weights of 1", [draw.normal(2, 4), torch.ones(4), draw.normal(2, 4)], length=100)
    yield Case("numbers of 1e-3", [draw.normal(2, 6, scale=1e-3), draw.normal(6), draw.normal(2, 6)], length=1000)
    yield Case("eps = 0.1", made(2, 7), {"eps": 0.1}, length=100)
    yield Case("three dimensions", made(2, 3, 9), length=100)
    yield Case("not contiguous", [draw.strided(5, 13), draw.normal(13), draw.strided(5, 13)], length=100)
    yield Case("67 rows of 257", made(67, 257))
