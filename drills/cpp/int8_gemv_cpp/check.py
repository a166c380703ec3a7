import torch

from finetune.drills.cases import Case
from finetune.drills.compiled import launch


def drive(code, w, w_scale, x, x_scale):
    return launch(code, [w, w_scale, x, x_scale], [(len(w),)], w.shape)


def reference(w, w_scale, x, x_scale):
    return (w.double() @ x.double()) * w_scale * x_scale


def cases(draw):
    for rows, columns in ((1, 1), (1, 15), (2, 16), (2, 17), (3, 257), (2, 5000)):
        w, x = (draw.integers(128, *shape, low=-128).to(torch.int8) for shape in ((rows, columns), (columns,)))
        scales = draw.uniform(rows, low=0.01), draw.uniform(1, low=0.01)
        yield Case(f"{rows} rows of {columns}", [w, scales[0], x, scales[1]], length=1)
    worst = torch.full((1, 1000), -128, dtype=torch.int8)
    yield Case("the largest products", [worst, torch.ones(1), worst[0], torch.ones(1)], length=1)
