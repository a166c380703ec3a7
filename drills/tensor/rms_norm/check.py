import torch

from finetune.drills.cases import Case


def drive(code, x, weight, dy, eps=1e-6):
    return {"y": code.rms_norm(x, weight, eps), "dx, dweight": code.rms_norm_backward(x, weight, dy, eps)}


def reference(x, weight, dy, eps=1e-6):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return {"y": y.detach(), "dx, dweight": torch.autograd.grad(y, (x, weight), dy)}


def cases(draw):
    def made(*shape, scale=1.0):
        return [draw.normal(*shape, scale=scale), draw.normal(shape[-1]), draw.normal(*shape)]

    yield Case("two numbers", made(2), length=100)
    yield Case("three numbers", made(3), length=100)
    yield Case("two rows of five", made(2, 5), length=100)
    yield Case("a mean of 3", [draw.normal(2, 5) + 3, draw.normal(5), draw.normal(2, 5)], length=100)
    yield Case("numbers of 1e-3", made(2, 6, scale=1e-3), length=1000)
    yield Case("eps = 0.1", made(2, 7), {"eps": 0.1}, length=100)
    yield Case("a row of zeros", [torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]), draw.normal(3), draw.normal(2, 3)])
    yield Case("three dimensions", made(2, 3, 9), length=100)
    yield Case("not contiguous", [draw.strided(5, 13), draw.normal(13), draw.strided(5, 13)], length=100)
    yield Case("67 rows of 257", made(67, 257))
