import torch

from finetune.drills.cases import Case


def cases(draw):
    def made(b, t, d, heads, lengths, scale=1.0):
        weights = [draw.normal(d, d, scale=scale * d**-0.5) for _ in range(4)]
        return [draw.normal(b, t, d), *weights, heads, torch.tensor(lengths)]

    yield Case("one token, one head", made(1, 1, 1, 1, [1]), grad=True)
    yield Case("two tokens, one head of two", made(1, 2, 2, 1, [2]), grad=True)
    yield Case("three tokens, two heads", made(1, 3, 4, 2, [3], 2.0), grad=True)
    yield Case("two rows, one padded", made(2, 3, 4, 2, [3, 2], 2.0), grad=True)
    yield Case("a row of one token", made(2, 4, 6, 3, [1, 4], 2.0), grad=True)
    yield Case("large scores", made(2, 5, 8, 2, [5, 3], 6.0), length=10_000)
    args = made(2, 5, 12, 4, [5, 3])
    yield Case("not contiguous", [draw.strided(2, 5, 12), *args[1:]], grad=True)
    yield Case("four heads of 16", made(3, 37, 64, 4, [37, 1, 20]), grad=True, length=200)
