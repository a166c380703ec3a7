import torch


def rope(x, offset=0, base=10000.0, interleaved=False):
    t, d = x.shape[-2:]
    i = torch.arange(d)
    pair = i // 2 if interleaved else i % (d // 2)
    first = i % 2 == 0 if interleaved else i < d // 2
    angles = torch.outer(torch.arange(t) + float(offset), torch.pow(base, -2.0 * pair / d))
    partner = (i ^ 1) if interleaved else (i + d // 2) % d
    sign = torch.where(first, -1.0, 1.0)
    return (x * angles.cos() + x[..., partner] * sign * angles.sin()).to(x.dtype)
