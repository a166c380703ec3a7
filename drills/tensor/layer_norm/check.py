import torch

from finetune.drills.cases import Case


def reference(x, weight, bias, eps=1e-5):
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def cases(draw):
    def made(*shape):
        return [draw.normal(*shape), draw.normal(shape[-1]), draw.normal(shape[-1])]

    yield Case("one number", made(1, 1))
    yield Case("three numbers", made(3), grad=True)
    yield Case("two rows of five", made(2, 5), grad=True)
    yield Case("equal numbers", [torch.full((2, 4), 3.0), draw.normal(4), draw.normal(4)])
    yield Case("numbers of 1e-3", [draw.normal(2, 6, scale=1e-3), draw.normal(6), draw.normal(6)], length=1000)
    yield Case("eps = 0.1", made(2, 7), {"eps": 0.1}, grad=True)
    yield Case("mean 1e4, deviation 1", [draw.normal(8, 64) + 1e4, draw.normal(64), draw.normal(64)])
    yield Case("three dimensions", made(2, 3, 9), grad=True)
    yield Case("bfloat16", [draw.normal(*s, dtype=torch.bfloat16) for s in ((3, 17), (17,), (17,))])
    yield Case("not contiguous", [draw.strided(5, 13), draw.normal(13), draw.normal(13)], grad=True)
    yield Case("769 numbers", made(3, 769))
