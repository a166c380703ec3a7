from finetune.drills.cases import Case


def reference(a, b):
    return a + b


def cases(draw):
    for n in (1, 2, 3, 127, 128, 129, 257, 1000):
        yield Case(f"{n} numbers", [draw.normal(n), draw.normal(n)])
