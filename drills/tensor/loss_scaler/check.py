import torch

from finetune.drills.cases import Case


def drive(code, start, interval, steps):
    """The scale after each step; a list of gradients in the place of a flag is unscaled first."""
    scaler = code.LossScaler(start, interval)
    found = []
    for step in steps:
        if isinstance(step, list):
            unscaled, step = scaler.unscale(step)
            found += [list(unscaled) if step else "skipped", bool(step)]
        scaler.update(step)
        found.append(float(scaler.scale))
    return found


def reference(start, interval, steps):
    scale, good, found = start, 0, []
    for step in steps:
        if isinstance(step, list):
            finite = all(bool(torch.isfinite(g).all()) for g in step)
            found += [[g.double() / scale for g in step] if finite else "skipped", finite]
            step = finite
        good = good + 1 if step else 0
        if not step:
            scale = max(scale / 2, 1.0)
        elif good == interval:
            scale, good = min(scale * 2, 2.0**24), 0
        found.append(scale)
    return found


def cases(draw):
    half = torch.float16
    inf, nan = torch.inf, torch.nan
    yield Case("one good step", [8.0, 2, [True]])
    yield Case("one bad step", [8.0, 2, [False]])
    yield Case("two good steps", [8.0, 2, [True, True]])
    yield Case("five good steps, interval 2", [8.0, 2, [True] * 5])
    yield Case("interval 1", [8.0, 1, [True, True, False, True]])
    yield Case("a bad step between good ones", [8.0, 3, [True, True, False, True, True, True, True]])
    yield Case("down to 1", [2.0, 3, [False] * 4 + [True] * 3])
    yield Case("up to 2**24", [2.0**23, 1, [True] * 4 + [False]])
    yield Case("gradients in fp32", [8.0, 2, [[draw.normal(3), draw.normal(2, 2)]]])
    yield Case("gradients in fp16", [1024.0, 2, [[draw.normal(5).half(), draw.normal(2, 2)]]])
    yield Case("small gradients in fp16", [65536.0, 2, [[torch.tensor([1e-4, 6e-8, 0.0]).to(half)]]])
    yield Case("an infinite gradient", [8.0, 2, [[draw.normal(3), torch.tensor([1.0, -inf])], True, True]])
    yield Case("a NaN", [8.0, 2, [[torch.tensor([nan, 1.0]), draw.normal(3)], True, True]])
    yield Case("inf and −inf", [8.0, 2, [[torch.tensor([inf, -inf], dtype=half)], [draw.normal(2)], True]])
    steps = [x for row in draw.flags(40, 5, share=0.8).tolist() for x in row]
    yield Case("200 steps", [65536.0, 4, steps])
