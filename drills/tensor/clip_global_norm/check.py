import math

import torch

from finetune.drills.cases import Case


def drive(code, gradients, max_norm):
    clipped, norm = code.clip_global_norm(gradients, max_norm)
    return {"norm": norm if math.isfinite(float(norm)) else "not finite", "clipped": list(clipped)}


def reference(gradients, max_norm):
    norm = sum((g.square().sum() for g in gradients if g is not None), torch.zeros((), dtype=torch.float64)).sqrt()
    finite = bool(norm.isfinite())
    scale = min(1.0, max_norm / float(norm)) if finite and norm > 0 else 1.0
    clipped = [None if g is None else g * scale if finite else torch.zeros_like(g) for g in gradients]
    return {"norm": norm if finite else "not finite", "clipped": clipped}


def cases(draw):
    inf = torch.inf
    yield Case("one number above", [[torch.tensor([3.0])], 1.0])
    yield Case("one number below", [[torch.tensor([0.5])], 1.0])
    yield Case("two tensors", [[torch.tensor([3.0]), torch.tensor([[4.0]])], 1.0])
    yield Case("two tensors, together below", [[draw.normal(2, 3, scale=0.1), draw.normal(4, scale=0.1)], 5.0])
    yield Case("one small, one large", [[draw.normal(3, scale=0.01), draw.normal(2, 2, scale=30)], 1.0])
    yield Case("all zeros", [[torch.zeros(2), torch.zeros(3)], 1.0])
    yield Case("no gradient for one", [[draw.normal(3), None, draw.normal(2)], 0.5])
    yield Case("no gradients", [[None], 1.0])
    yield Case("norm of 1e-4, larger than the limit", [[draw.normal(4, scale=1e-4)], 1e-5])
    yield Case("an infinite number", [[torch.tensor([1.0, inf]), draw.normal(3)], 1.0])
    yield Case("a number that is NaN", [[torch.tensor([1.0, torch.nan]), draw.normal(3)], 1.0])
    yield Case("float16, squares above 65504", [[(draw.normal(40) * 100).half(), draw.normal(3)], 1.0])
    yield Case("bfloat16", [[draw.normal(5, 7, dtype=torch.bfloat16)], 1.0])
    yield Case("not contiguous", [[draw.strided(5, 7), draw.strided(3, 4)], 1.0])
    yield Case("10007 numbers", [[draw.normal(10007), draw.normal(3)], 1.0], length=10007)
