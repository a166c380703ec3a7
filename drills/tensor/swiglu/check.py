import torch

from finetune.drills.cases import Case


def drive(code, *args):
    return code.hidden_size(*args) if len(args) == 2 else code.swiglu(*args)


def cases(draw):
    def made(*shape, h):
        d = shape[-1]
        return [draw.normal(*shape), draw.normal(h, d), draw.normal(h, d), draw.normal(d, h)]

    yield Case("d = 1, h = 1", made(1, h=1), grad=True)
    yield Case("d = 2, h = 3", made(2, h=3), grad=True)
    yield Case("d = 3, h = 3", made(2, 3, h=3), grad=True)
    large = [torch.tensor([[-1000.0, 1000.0]]), torch.eye(2), torch.eye(2), draw.normal(2, 2)]
    yield Case("gate x of ±1000", large, grad=True)
    yield Case("three dimensions", made(2, 3, 5, h=7), grad=True)
    yield Case("not contiguous", [draw.strided(5, 13), *made(13, h=17)[1:]], grad=True)
    yield Case("h = 256", made(3, 96, h=256), grad=True)
    for d, multiple in ((4096, 256), (5120, 256), (8192, 256), (96, 256), (3, 1), (4, 1), (11, 8), (97, 32)):
        yield Case(f"width for d = {d}, multiples of {multiple}", [d, multiple])
