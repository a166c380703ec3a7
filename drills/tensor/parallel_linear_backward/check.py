import torch

from finetune.drills.cases import Case


def drive(code, x, ups, downs, bias, dy):
    calls = []

    def all_reduce(tensors):
        calls.append([*tensors[0].shape])
        return [sum(tensors[1:], tensors[0]) for _ in tensors]

    found = code.mlp(x, ups, downs, bias, dy, all_reduce)
    return {**{name: list(each) for name, each in found.items()}, "calls of all_reduce": len(calls)}


def reference(x, ups, downs, bias, dy):
    leaves = [each.clone().requires_grad_() for each in (x, bias, *ups, *downs)]
    n = len(ups)
    up, down = torch.cat(leaves[2 : 2 + n]), torch.cat(leaves[2 + n :], 1)
    y = (leaves[0] @ up.T).relu() @ down.T + leaves[1]
    dx, dbias, *rest = torch.autograd.grad(y, leaves, dy)
    found = {"y": [y.detach()] * n, "dx": [dx] * n, "dups": rest[:n], "ddowns": rest[n:], "dbias": [dbias] * n}
    return found | {"calls of all_reduce": 2}


def cases(draw):
    def arguments(t, d, *widths):
        ups, downs = [draw.normal(h, d) for h in widths], [draw.normal(d, h) for h in widths]
        return [draw.normal(t, d), ups, downs, draw.normal(d), draw.normal(t, d)]

    positive = arguments(1, 1, 1)
    yield Case("one rank, all numbers positive", [abs(positive[0]), [abs(positive[1][0])], *positive[2:]], length=4)
    yield Case("one rank", arguments(2, 2, 3), length=4)
    yield Case("two ranks", arguments(1, 2, 2, 2), length=4)
    yield Case("two ranks, three tokens", arguments(3, 2, 3, 3), length=6)
    yield Case("ranks of unlike width", arguments(2, 3, 1, 4), length=5)
    dead = arguments(2, 2, 2, 2)
    dead[0] = torch.zeros(2, 2)
    yield Case("zeros before relu", dead, length=4)
    yield Case("three ranks", arguments(5, 7, 3, 3, 3), length=9)
    yield Case("four ranks, 13 tokens", arguments(13, 17, 31, 31, 31, 31), length=124)
