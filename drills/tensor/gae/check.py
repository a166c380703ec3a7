import torch

from finetune.drills.cases import Case


def cases(draw):
    def arguments(*shape, terminated=(), truncated=(), gamma=0.9, lam=0.8):
        flags = torch.zeros(2, *shape, dtype=torch.bool)
        for i, each in enumerate((terminated, truncated)):
            for step in each:
                flags[i][step] = True
        return [*(draw.normal(*shape) for _ in range(3)), *flags, gamma, lam]

    yield Case("one step", arguments(1))
    yield Case("one step, terminated", arguments(1, terminated=[0]))
    yield Case("one step, truncated", arguments(1, truncated=[0]))
    yield Case("two steps", arguments(2))
    yield Case("two steps, the first terminated", arguments(2, terminated=[0]))
    yield Case("two steps, the first truncated", arguments(2, truncated=[0]))
    yield Case("three steps", arguments(3))
    yield Case("a step that is both", arguments(3, terminated=[1], truncated=[1]))
    yield Case("gamma 1, lambda 1", arguments(4, truncated=[2], gamma=1.0, lam=1.0))
    yield Case("lambda 0", arguments(4, terminated=[1], lam=0.0))
    yield Case("gamma 0", arguments(4, truncated=[1], gamma=0.0))
    yield Case("two environments", arguments(5, 2, terminated=[(2, 0)], truncated=[(1, 1)]))
    long = arguments(61, 3, gamma=0.99, lam=0.95)
    long[3], long[4] = draw.flags(61, 3, share=0.05), draw.flags(61, 3, share=0.05)
    yield Case("61 steps of three environments", long)
