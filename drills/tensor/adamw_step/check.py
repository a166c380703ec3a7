import torch

from finetune.drills.cases import Case


def drive(code, *args, **kwargs):
    return dict(zip(("p", "m", "v"), code.adamw_step(*args, **kwargs), strict=True))


def cases(draw):
    def made(*shape, step):
        return [draw.normal(*shape), draw.normal(*shape), draw.normal(*shape), draw.uniform(*shape), step]

    def fresh(*shape):
        return [draw.normal(*shape), draw.normal(*shape), torch.zeros(shape), torch.zeros(shape), 1]

    plain = {"lr": 0.1, "weight_decay": 0.0}
    yield Case("the first step, no decay", fresh(1), plain, length=100)
    yield Case("step 2, no decay", made(2, step=2), plain, length=100)
    yield Case("the first step, with decay", fresh(3), {"lr": 0.1, "weight_decay": 0.5}, length=100)
    yield Case("step 3, with decay", made(3, step=3), {"lr": 0.1, "weight_decay": 0.5}, length=100)
    yield Case("gradient and moments of 0", [draw.normal(3), *(torch.zeros(3) for _ in range(3)), 1], {"lr": 0.1})
    yield Case(
        "gradients of 1e-6",
        [draw.normal(4), draw.normal(4) * 1e-6, torch.zeros(4), torch.zeros(4), 1],
        {"lr": 0.1},
        length=100,
    )
    yield Case("eps = 0.1", made(3, step=2), {"lr": 0.1, "eps": 0.1}, length=100)
    yield Case("other betas", made(3, step=5), {"lr": 0.1, "beta1": 0.8, "beta2": 0.95}, length=100)
    yield Case("step 1000", made(5, 7, step=1000), {"lr": 0.1}, length=100)
    strided = [draw.strided(5, 6), draw.strided(5, 6), draw.strided(5, 6), draw.strided(5, 6).square(), 4]
    yield Case("not contiguous", strided, {"lr": 0.1}, length=100)
