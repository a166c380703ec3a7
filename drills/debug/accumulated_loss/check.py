import torch

from finetune.drills.cases import Case


def cases(draw):
    def arguments(v, d, b, t, rows, share=0.0):
        targets = draw.integers(v, b, t)
        targets[draw.flags(b, t, share=share)] = -100
        return [draw.normal(v, d), draw.normal(b, t, d), targets, rows]

    yield Case("one row, one micro-batch", arguments(3, 2, 1, 2, 1))
    yield Case("two rows, one micro-batch", arguments(3, 2, 2, 2, 2))
    yield Case("two rows, two micro-batches", arguments(3, 2, 2, 2, 1))
    unlike = arguments(3, 2, 2, 3, 1)
    unlike[2][1, 1:] = -100
    yield Case("rows of three tokens and of one", unlike)
    yield Case("three rows, micro-batches of two", arguments(3, 2, 3, 2, 2))
    nothing = arguments(3, 2, 2, 2, 1)
    nothing[2][0] = -100
    yield Case("a row in which nothing counts", nothing)
    yield Case("nothing counts", [*arguments(3, 2, 2, 2, 1)[:2], torch.full((2, 2), -100), 1])
    yield Case("more rows than there are", arguments(3, 2, 2, 2, 5))
    yield Case("seven rows of 13, micro-batches of three", arguments(17, 11, 7, 13, 3, share=0.4), length=91)
