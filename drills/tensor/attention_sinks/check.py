import torch

from finetune.drills.cases import Case


def cases(draw):
    def made(h, tq, tk, d, make=draw.normal, scale=1.0):
        return [make(h, tq, d) * scale, make(h, tk, d), make(h, tk, d), draw.normal(h)]

    yield Case("one query, one key", made(1, 1, 1, 1), grad=True)
    yield Case("two queries, two keys", made(1, 2, 2, 3), grad=True)
    yield Case("two heads", made(2, 3, 3, 4), grad=True)
    yield Case("two queries, five keys", made(2, 2, 5, 8), grad=True)
    args = made(2, 3, 3, 4)
    yield Case("a sink of 1e4", [*args[:3], torch.tensor([1e4, 0.0])], grad=True)
    yield Case("a sink of −1e4", [*args[:3], torch.tensor([-1e4, 0.0])], grad=True)
    yield Case("large scores", made(2, 4, 4, 4, scale=100.0), grad=True, length=100_000)
    yield Case("not contiguous", made(3, 5, 7, 16, draw.strided), grad=True)
    yield Case("31 queries, 67 keys", made(2, 31, 67, 32), length=131)
