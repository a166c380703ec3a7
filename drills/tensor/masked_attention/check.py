import torch

from finetune.drills.cases import Case


def cases(draw):
    def made(b, h, tq, tk, d, make=draw.normal):
        mask = draw.flags(b, tq, tk, share=0.6)
        mask[:, :, 0] = True
        return [make(b, h, tq, d), make(b, h, tk, d), make(b, h, tk, d), mask]

    yield Case("one query, one key", made(1, 1, 1, 1, 1), grad=True)
    args = made(1, 1, 2, 3, 2)
    args[3] = torch.tensor([[[True, False, True], [False, True, False]]])
    yield Case("two queries, three keys", args, grad=True)
    yield Case("two heads", made(1, 2, 3, 4, 3), grad=True)
    yield Case("as many rows as heads", made(2, 2, 3, 4, 3), grad=True)
    yield Case("with a bias", [*made(1, 2, 2, 3, 4), draw.normal(2, 2, 3)], grad=True)
    yield Case("a bias, as many rows as heads", [*made(2, 2, 3, 3, 4), draw.normal(2, 3, 3)], grad=True)
    args = made(1, 2, 3, 4, 3)
    args[3][0, 1] = False
    yield Case("a query that sees nothing", args, grad=True)
    yield Case("large scores", [x * 8 if x.is_floating_point() else x for x in made(1, 2, 5, 5, 8)], length=10_000)
    yield Case("float16", [x.half() if x.is_floating_point() else x for x in made(2, 3, 4, 5, 8)])
    yield Case("not contiguous", [*made(2, 3, 5, 7, 8, draw.strided), draw.strided(3, 5, 7)], grad=True)
    yield Case("31 queries, 67 keys", made(2, 2, 31, 67, 32), grad=True, length=200)
