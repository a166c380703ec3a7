from finetune.drills.cases import Case
from finetune.drills.compiled import launch

LIMITS = {"sectors": 1.6, "conflicts": 0}


def drive(code, x):
    return launch(code, [x], [(x.shape[1], x.shape[0])], x.shape)


def reference(x):
    return x.T


def cases(draw):
    for rows, columns in ((1, 1), (1, 3), (2, 2), (33, 31), (5, 70), (70, 5), (96, 64)):
        yield Case(f"{rows} × {columns}", [draw.normal(rows, columns)])
