import torch

from finetune.drills.cases import Case


def reference(average, weights, step, decay=0.999):
    d = min(decay, (1 + step) / (10 + step))
    return {
        name: d * average[name] + (1 - d) * new if new.is_floating_point() else new for name, new in weights.items()
    }


def cases(draw):
    def two(*shape, dtype=torch.float32):
        return [{"w": draw.normal(*shape)}, {"w": draw.normal(*shape).to(dtype)}]

    yield Case("the first step", [*two(1), 0], length=100)
    yield Case("decay 0.5 after its warm-up", [*two(3), 20, 0.5], length=100)
    yield Case("step 1", [*two(3), 1], length=100)
    yield Case("step 100", [*two(3), 100], length=100)
    yield Case("step 10000", [*two(3), 10000], length=100)
    yield Case("decay 0", [*two(3), 5, 0.0], length=100)
    counted = [{"w": draw.normal(2), "seen": torch.tensor(41)}, {"w": draw.normal(2), "seen": torch.tensor(42)}]
    yield Case("with a counter", [*counted, 7], length=100)
    flags = [{"on": torch.tensor([3, 4], dtype=torch.int32)}, {"on": torch.tensor([5, 4], dtype=torch.int32)}]
    yield Case("only whole numbers", [*flags, 7])
    yield Case("weights in bfloat16", [*two(5, dtype=torch.bfloat16), 3], length=100)
    small = [{"w": torch.full((4,), 1.0)}, {"w": torch.full((4,), 1.0078125, dtype=torch.bfloat16)}]
    yield Case("a small change in bfloat16", [*small, 20000], length=1)
    several = [{k: draw.normal(3, 4) for k in "abc"}, {k: draw.strided(3, 4) for k in "abc"}]
    yield Case("several tensors, not contiguous", [*several, 50], length=100)
