import torch

from finetune.drills.cases import Case


def drive(code, weight, x):
    codes, scales = code.quantize(weight)
    return {"codes": codes, "scales": scales, "linear": code.linear(x, codes, scales)}


def reference(weight, x):
    scales = weight.abs().amax(1) / 127
    scales[scales == 0] = 1.0
    codes = (weight / scales[:, None]).round()
    return {"codes": codes.to(torch.int8), "scales": scales, "linear": x @ (codes * scales[:, None]).T}


def between(draw, out, width):
    """Weights whose quotient by the scale is not near a half: no order of operations rounds them otherwise."""
    codes = draw.integers(128, out, width, low=-127) + draw.uniform(out, width, low=-0.3, high=0.3)
    codes[:, 0] = 127.0
    return codes.clamp(-127, 127) * draw.uniform(out, 1, low=0.001, high=0.1)


def cases(draw):
    yield Case("one weight", [torch.tensor([[0.5]]), torch.ones(1, 1)])
    yield Case("rounded up", [torch.tensor([[127.0, 2.7, -2.7]]), draw.normal(1, 3)])
    yield Case("halves", [torch.tensor([[127.0, 0.5, 1.5, -2.5]]), draw.normal(4)])
    yield Case("a row of zeros", [torch.tensor([[0.0, 0.0], [1.0, 2.0]]), draw.normal(2, 2)])
    yield Case("the largest is negative", [torch.tensor([[-4.0, 1.0], [1.0, -1.0]]), draw.normal(2, 2)])
    yield Case("rows of different size", [torch.tensor([[100.0, 1.0], [0.01, 0.02]]), draw.normal(3, 2)])
    yield Case("three of five", [between(draw, 3, 5), draw.normal(2, 5)])
    even = torch.tensor([[127.0, 3.0, -50.0], [64.0, -5.0, 127.0]]) * 0.75
    yield Case("bfloat16", [even.bfloat16(), draw.normal(2, 3)])
    yield Case("tiny weights", [between(draw, 2, 3) * 1e-6, draw.normal(2, 3)])
    yield Case("not contiguous", [between(draw, 7, 26)[:, ::2], draw.strided(2, 3, 13)])
    yield Case("67 of 131", [between(draw, 67, 131), draw.normal(3, 131)])
