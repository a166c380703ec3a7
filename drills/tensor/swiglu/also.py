import torch
import torch.nn.functional as F


def swiglu(x, gate, up, down):
    opened, kept = F.linear(x, torch.cat([gate, up])).chunk(2, -1)
    return torch.einsum("...h,dh->...d", F.silu(opened) * kept, down)


def hidden_size(d, multiple=256):
    h = int(2 * 4 * d / 3)
    return (h + multiple - 1) // multiple * multiple
