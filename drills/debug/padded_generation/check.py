import torch

from finetune.drills.cases import Case


def cases(draw):
    def arguments(d, t, *lengths):
        return [draw.normal(len(lengths), t, d), *(draw.normal(d, d) for _ in range(3)), torch.tensor(lengths)]

    yield Case("one token", arguments(2, 1, 1))
    yield Case("three tokens", arguments(2, 3, 3))
    yield Case("two rows of three", arguments(2, 3, 3, 3))
    yield Case("two tokens in a row of three", arguments(2, 3, 2))
    yield Case("one token in a row of three", arguments(3, 3, 1))
    yield Case("rows of three and one", arguments(2, 3, 3, 1))
    yield Case("a row without tokens", arguments(2, 3, 2, 0))
    large = arguments(4, 5, 2, 5)
    large[0][0, :3] *= 1000
    yield Case("large numbers in the padding", large)
    yield Case("four rows of 31", arguments(16, 31, 31, 1, 17, 30))
