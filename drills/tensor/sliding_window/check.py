from finetune.drills.cases import Case


def cases(draw):
    def made(tq, tk, d, make=draw.normal):
        return [make(tq, d), make(tk, d), make(tk, d)]

    yield Case("one query, one key", made(1, 1, 1), {"window": 1}, grad=True)
    yield Case("two keys, window 1", made(2, 2, 3), {"window": 1}, grad=True)
    yield Case("three keys, window 2", made(3, 3, 4), {"window": 2}, grad=True)
    yield Case("a window wider than the text", made(3, 3, 4), {"window": 9}, grad=True)
    yield Case("one query, five keys, window 3", made(1, 5, 4), {"window": 3}, grad=True)
    yield Case("two queries, five keys, window 2", made(2, 5, 8), {"window": 2}, grad=True)
    yield Case("ALiBi, all in the window", made(3, 3, 4), {"window": 3, "slope": 0.5}, grad=True)
    yield Case("ALiBi, two queries, five keys", made(2, 5, 4), {"window": 3, "slope": 0.25}, grad=True)
    yield Case("large scores", [x * 30 for x in made(5, 5, 4)], {"window": 3}, length=10_000)
    yield Case("not contiguous", made(7, 13, 16, draw.strided), {"window": 4, "slope": 0.1}, grad=True)
    yield Case("67 queries, 131 keys", made(67, 131, 32), {"window": 17, "slope": 0.1}, length=131)
