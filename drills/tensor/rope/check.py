import torch

from finetune.drills.cases import Case


def reference(x, offset=0, base=10000.0, interleaved=False):
    t, d = x.shape[-2:]
    angles = torch.outer(
        torch.arange(offset, offset + t, dtype=torch.float64),
        base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d),
    )
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).mT
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    return turned.flatten(-2) if interleaved else turned.mT.flatten(-2)


def cases(draw):
    for interleaved in (False, True):
        name, how = ("interleaved", {"interleaved": True}) if interleaved else ("halves", {})
        yield Case(f"one pair at position 0, {name}", [draw.normal(1, 2)], how, grad=True)
        yield Case(f"one pair at position 1, {name}", [draw.normal(1, 2)], how | {"offset": 1}, grad=True)
        yield Case(f"two tokens of four, {name}", [draw.normal(2, 4)], how, grad=True)
        yield Case(f"offset 7, {name}", [draw.normal(3, 8)], how | {"offset": 7}, grad=True)
        yield Case(f"base 500000, {name}", [draw.normal(5, 6)], how | {"base": 500000.0}, grad=True)
        yield Case(f"four dimensions, {name}", [draw.normal(2, 3, 5, 8)], how | {"offset": 2}, grad=True)
        yield Case(f"not contiguous, {name}", [draw.strided(2, 7, 6)], how, grad=True)
        late = draw.normal(3, 8, dtype=torch.bfloat16)
        yield Case(f"bfloat16 at position 1000, {name}", [late], how | {"offset": 1000})
        yield Case(f"131 tokens of 64, {name}", [draw.normal(131, 64)], how, length=1000)
