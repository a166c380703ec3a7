from finetune.drills.cases import Case
from finetune.drills.compiled import launch

LIMITS = {"sectors": 5, "conflicts": 0}


def drive(code, a, b):
    (m, k), n = a.shape, b.shape[1]
    return launch(code, [a, b], [(m, n)], [m, n, k])


def reference(a, b):
    return a @ b


def cases(draw):
    for m, n, k in ((1, 1, 1), (2, 3, 2), (16, 16, 16), (17, 15, 33), (5, 40, 1), (40, 5, 70), (64, 64, 64)):
        yield Case(f"{m} × {n} × {k}", [draw.normal(m, k), draw.normal(k, n)], length=k)
