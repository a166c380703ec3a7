import torch

from finetune.drills.cases import Case, Largest


def drive(code, q, k, v, block_q, block_k, causal=False, memory=False):
    with Largest() as most:
        out, lse = code.flash_attention(q, k, v, block_q, block_k, causal)
    found = {"out": out, "lse": lse}
    limit = max(q.numel(), k.numel(), block_q * block_k)
    return found | {"a tensor larger than q, k and a tile": most.elements > limit} if memory else found


def reference(q, k, v, block_q, block_k, causal=False, memory=False):
    scores = q @ k.T / q.shape[1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(len(k) - len(q) + 1).bool(), -torch.inf)
    found = {"out": scores.softmax(1).nan_to_num(0.0) @ v, "lse": scores.logsumexp(1)}
    return found | {"a tensor larger than q, k and a tile": False} if memory else found


def cases(draw):
    def made(tq, tk, d, make=draw.normal, scale=1.0):
        return [make(tq, d) * scale, make(tk, d), make(tk, d)]

    causal = {"causal": True}
    yield Case("one query, one key", [*made(1, 1, 1), 1, 1])
    yield Case("one tile", [*made(2, 3, 2, scale=2.0), 2, 3])
    yield Case("two tiles of keys", [*made(2, 4, 2, scale=3.0), 2, 2])
    yield Case("two tiles of queries", [*made(4, 2, 3), 2, 2])
    yield Case("tiles that do not divide", [*made(5, 7, 4, scale=3.0), 2, 3])
    yield Case("tiles larger than the whole", [*made(3, 3, 4), 16, 16])
    yield Case("causal", [*made(4, 4, 4, scale=2.0), 2, 2], causal)
    yield Case("causal, wide tiles of queries", [*made(6, 6, 4, scale=2.0), 4, 2], causal)
    yield Case("causal, fewer queries than keys", [*made(3, 7, 4), 2, 2], causal)
    yield Case("causal, more queries than keys", [*made(5, 2, 4), 2, 1], causal)
    q, k = draw.integers(4, 4, 4, low=-3) * 1000.0, draw.integers(3, 6, 4, low=-2) + 0.0
    yield Case("scores of 1e4", [q, k, draw.normal(6, 4), 2, 2], length=100_000)
    yield Case("not contiguous", [*made(7, 13, 16, draw.strided), 4, 4], causal)
    yield Case("memory: tiles of 16 × 16", [*made(64, 64, 8), 16, 16], {"memory": True})
    yield Case("67 queries, 131 keys", [*made(67, 131, 32), 16, 32], causal, length=200)
