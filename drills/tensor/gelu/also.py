import torch


def gelu(x, tanh=False):
    if tanh:
        twice = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
        s = torch.sigmoid(twice)
        return x * s, s * (1 + x * torch.sigmoid(-twice) * 1.5957691216057308 * (1 + 0.134145 * x * x))
    phi = torch.special.ndtr(x)
    return x * phi, torch.addcmul(phi, x, torch.exp(-x.square() / 2), value=0.3989422804014327)
