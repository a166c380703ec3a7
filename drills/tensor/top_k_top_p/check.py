import torch

from finetune.drills.cases import Case


def cases(draw):
    off = {"k": 0, "p": 1.0, "min_p": 0.0}
    three = torch.tensor([1.0, 3.0, 2.0])
    yield Case("all filters off", [three], off)
    yield Case("one token", [draw.normal(1)], {"k": 1, "p": 0.5, "min_p": 0.5})
    yield Case("k = 1", [three], off | {"k": 1})
    yield Case("k above v", [three], off | {"k": 5})
    yield Case("a tie at the k-th", [torch.tensor([1.0, 2.0, 1.0, 0.0])], off | {"k": 2})
    yield Case("p reached by the second", [three], off | {"p": 0.7})
    yield Case("p less than the first", [three], off | {"p": 0.1})
    yield Case("a tie at p", [torch.tensor([0.0, 1.0, 0.0, 0.0])], off | {"p": 0.6})
    yield Case("a tie at the first, small p", [torch.tensor([1.0, 1.0, 1.0, 0.0])], off | {"p": 0.2})
    yield Case("p = 1, improbable tokens", [torch.tensor([20.0, 0.0, -20.0])], off)
    yield Case("min_p 0.3", [three], off | {"min_p": 0.3})
    yield Case("min_p 0.1 of a flat row", [draw.normal(17, scale=0.1)], off | {"min_p": 0.1})
    yield Case("k, then p of the rest", [torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])], off | {"k": 2, "p": 0.5})
    yield Case("p, then min_p", [torch.tensor([0.0, 2.0, 1.5, 1.9])], {"k": 0, "p": 0.8, "min_p": 0.9})
    yield Case("a logit of −inf", [torch.tensor([0.0, -torch.inf, 1.0])], {"k": 3, "p": 0.99, "min_p": 0.01})
    yield Case("two rows", [draw.normal(2, 5)], {"k": 3, "p": 0.8, "min_p": 0.1})
    yield Case("three dimensions", [draw.normal(2, 3, 7, scale=2)], off | {"p": 0.9})
    yield Case("not contiguous", [draw.strided(3, 101)], {"k": 40, "p": 0.9, "min_p": 0.02})
