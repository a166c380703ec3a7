from finetune.drills.cases import Case


def cases(draw):
    for tq, tk, d in ((1, 1, 1), (2, 2, 3), (3, 3, 4)):
        yield Case(f"{tq} queries, {tk} keys", [draw.normal(t, d) for t in (tq, tk, tk)], grad=True)
    yield Case("one query, three keys", [draw.normal(t, 4) for t in (1, 3, 3)], grad=True)
    yield Case("two queries, five keys", [draw.normal(t, 8) for t in (2, 5, 5)], grad=True)
    yield Case("more queries than keys", [draw.normal(t, 4) for t in (4, 2, 2)], grad=True)
    yield Case("large scores", [draw.normal(5, 4, scale=30) for _ in range(3)])
    yield Case("not contiguous", [draw.strided(t, 16) for t in (7, 13, 13)], grad=True)
    yield Case("67 queries, 131 keys", [draw.normal(t, 64) for t in (67, 131, 131)], length=131)
