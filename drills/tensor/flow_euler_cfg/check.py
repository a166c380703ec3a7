import torch

from finetune.drills.cases import Case


def drive(code, table, noise, labels, null, scale, steps, shift):
    """A model with a row of the table for each label; not linear, or steps in reverse order would give the same."""

    def velocity(x, t, labels):
        a, b, c = table[labels].unbind(1)
        return a * x.roll(1, -1).sin() + b * t[:, None] ** 2 + c

    return code.sample(velocity, noise, labels, null, scale, steps, shift)


def cases(draw):
    def arguments(b, d, scale=1.0, steps=1, shift=1.0, null=0):
        return [draw.normal(5, 3, d), draw.normal(b, d), draw.integers(5, b, low=1), null, scale, steps, shift]

    yield Case("one step, no guidance", arguments(1, 1))
    yield Case("one step, scale 3", arguments(1, 1, 3.0))
    yield Case("scale 0", arguments(1, 2, 0.0))
    yield Case("two steps", arguments(1, 2, 2.0, 2))
    yield Case("three steps, shift 3", arguments(1, 2, 2.0, 3, 3.0))
    yield Case("shift below 1", arguments(2, 2, 1.5, 3, 0.5))
    yield Case("null is the last label", arguments(3, 2, 4.0, 2, null=4))
    yield Case("labels differ", [*arguments(3, 2)[:2], torch.tensor([1, 3, 0]), 2, 2.5, 4, 1.0])
    yield Case("strided noise", [draw.normal(5, 3, 7), draw.strided(2, 7), torch.tensor([1, 2]), 0, 2.0, 3, 2.0])
    yield Case("ten steps of 31 numbers", arguments(5, 31, 4.5, 10, 3.0), length=310)
