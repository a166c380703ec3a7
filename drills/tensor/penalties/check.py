import torch

from finetune.drills.cases import Case


def cases(draw):
    def said(repetition=1.0, presence=0.0, frequency=0.0):
        return {"repetition": repetition, "presence": presence, "frequency": frequency}

    x = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    yield Case("nothing was said", [x, [[]], [[]]], said(2.0, 1.0, 1.0))
    yield Case("repetition, a positive logit", [x, [[0]], [[]]], said(2.0))
    yield Case("repetition, a negative logit", [x, [[]], [[1]]], said(2.0))
    yield Case("repetition, a token said three times", [x, [[0, 0]], [[0]]], said(1.5))
    yield Case("presence, in the output", [x, [[]], [[0, 1, 0]]], said(presence=0.5))
    yield Case("presence, in the prompt", [x, [[0]], [[]]], said(presence=0.5))
    yield Case("frequency, twice in the output", [x, [[0]], [[0, 0, 1]]], said(frequency=0.5))
    yield Case("frequency below 0", [x, [[2]], [[2]]], said(frequency=-0.5))
    yield Case("all three turn a sign", [x, [[3]], [[3, 3]]], said(2.0, 1.0, 0.5))
    yield Case("a logit of −inf", [torch.tensor([[0.0, -torch.inf]]), [[1]], [[1]]], said(2.0, 0.5, 0.5))
    yield Case("two rows", [draw.normal(2, 3), [[0], [1]], [[1, 2], []]], said(1.2, 0.3, 0.1))
    lists = [[draw.integers(101, 40).tolist() for _ in range(5)] for _ in range(2)]
    yield Case("five rows of 101", [draw.normal(5, 101), *lists], said(1.1, 0.2, 0.3))
