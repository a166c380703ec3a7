import torch

from finetune.drills.cases import Case, Largest


def drive(code, q, k, v, copies=False):
    with Largest() as most:
        found = code.grouped_query_attention(q, k, v)
    return {"result": found, "tensor with more elements than k": most.elements > k.numel()} if copies else found


def reference(q, k, v, copies=False):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
    out = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return {"result": out, "tensor with more elements than k": False} if copies else out


def cases(draw):
    def made(b, hq, hk, tq, tk, d, make=draw.normal):
        return [make(b, hq, tq, d), make(b, hk, tk, d), make(b, hk, tk, d)]

    yield Case("one of everything", made(1, 1, 1, 1, 1, 1), grad=True)
    yield Case("one key head, two query heads", made(1, 2, 1, 2, 2, 2), grad=True)
    yield Case("two key heads, four query heads", made(1, 4, 2, 3, 3, 4), grad=True)
    yield Case("as many key heads as query heads", made(1, 3, 3, 3, 3, 4), grad=True)
    yield Case("one query, five keys", made(2, 4, 2, 1, 5, 4), grad=True)
    yield Case("two queries, five keys", made(2, 6, 2, 2, 5, 8), grad=True)
    yield Case("large scores", [x * 8 for x in made(1, 4, 2, 5, 5, 8)], length=10_000)
    yield Case("not contiguous", made(2, 6, 3, 5, 7, 8, draw.strided), grad=True)
    yield Case("memory: one query, 64 keys", made(2, 8, 2, 1, 64, 16), {"copies": True})
    yield Case("31 queries, 67 keys", made(1, 8, 2, 31, 67, 32), grad=True, length=200)
