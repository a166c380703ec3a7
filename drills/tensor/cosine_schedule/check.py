import torch

from finetune.drills.cases import Case


def drive(code, steps, **schedule):
    return torch.tensor([code.cosine_schedule(step, **schedule) for step in steps], dtype=torch.float32)


def cases(draw):
    def case(name, steps, warmup, total, peak=1.0, floor=0.0):
        return Case(name, [steps], {"warmup": warmup, "total": total, "peak": peak, "floor": floor}, length=100)

    yield case("the first step", [0], 2, 10)
    yield case("the warm-up", [0, 1, 2], 3, 10)
    yield case("where the warm-up ends", [2, 3, 4], 3, 10)
    yield case("no warm-up", [0, 1, 2], 0, 4)
    yield case("half of the cosine", [6], 2, 10)
    yield case("the last steps", [8, 9], 2, 10)
    yield case("at and after the end", [9, 10, 11, 15, 18, 100], 2, 10)
    yield case("a floor of 0.1", [0, 1, 2, 5, 9, 10, 30], 2, 10, 1.0, 0.1)
    yield case("one step in all", [0, 1], 0, 1, 3e-4, 3e-5)
    yield case("one step after the warm-up", [0, 4, 5, 6], 5, 6, 3e-4, 3e-5)
    yield case("a peak of 3e-4 over 1000 steps", [*range(0, 1010, 7)], 100, 1000, 3e-4, 3e-5)
