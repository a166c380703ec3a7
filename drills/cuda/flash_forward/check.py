from finetune.drills.cases import Case
from finetune.drills.compiled import launch

LIMITS = {"conflicts": 0}


def drive(code, q, k, v):
    return launch(code, [q, k, v], [tuple(q.shape)], [len(q), len(k)])


def reference(q, k, v):
    return (q @ k.T / 32**0.5).softmax(-1) @ v


def cases(draw):
    for tq, tk in ((1, 1), (1, 2), (2, 31), (3, 32), (4, 33), (5, 64), (6, 70)):
        yield Case(f"{tq} queries, {tk} keys", [draw.normal(t, 32) for t in (tq, tk, tk)], length=tk)
    rising = draw.normal(40, 32)
    rising[:, 0] += 4 * draw.integers(2, 40).cumsum(0) - 40  # the largest score comes late
    query = draw.normal(3, 32)
    query[:, 0] = 4
    yield Case("large scores in the last tile", [query, rising, draw.normal(40, 32)], length=10_000)
    yield Case("9 queries, 65 keys", [draw.normal(t, 32) for t in (9, 65, 65)], length=65)
