import torch

from finetune.drills.cases import Case


def cases(draw):
    short = torch.tensor([0.95, 0.8, 0.5, 0.2])
    long = torch.cos(torch.linspace(0.02, 1.5, 1000, dtype=torch.float64)).square().float()

    def arguments(*shape, signal=short, t=1, s=0, eta=0.0, clip=None):
        images = {"x": draw.normal(*shape), "epsilon": draw.normal(*shape), "noise": draw.normal(*shape)}
        return images | {"signal": signal, "t": t, "s": s, "eta": eta, "clip": clip}

    yield Case("to the time before", (), arguments(1))
    yield Case("two times at once", (), arguments(1, t=3, s=1))
    yield Case("the last step, from time 0", (), arguments(2, t=0, s=-1))
    yield Case("the only step, from time 3", (), arguments(2, t=3, s=-1))
    yield Case("eta 1", (), arguments(2, t=2, s=1, eta=1.0))
    yield Case("eta 0.5, two times at once", (), arguments(3, t=3, s=1, eta=0.5))
    yield Case("the last step, eta 1", (), arguments(2, t=1, s=-1, eta=1.0))
    yield Case("clipped", (), arguments(3, t=3, s=1, clip=0.5))
    yield Case("clipped, eta 1", (), arguments(3, t=3, s=0, eta=1.0, clip=0.5))
    yield Case("clip beyond all values", (), arguments(3, t=2, s=1, clip=100.0))
    yield Case("1000 times, in steps of 50", (), arguments(2, 3, 5, signal=long, t=949, s=899, eta=0.3))
    yield Case("1000 times, uneven", (), arguments(2, 3, 7, 11, signal=long, t=701, s=37, eta=1.0, clip=1.0))
