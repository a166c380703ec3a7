import torch


def rms(x, eps):
    return torch.sqrt(torch.einsum("...i,...i->...", x, x) / x.shape[-1] + eps)[..., None]


def rms_norm(x, weight, eps=1e-6):
    return x / rms(x, eps) * weight


def rms_norm_backward(x, weight, dy, eps=1e-6):
    r = rms(x, eps)
    g = torch.einsum("...i,i->...i", dy, weight)
    dot = torch.einsum("...i,...i->...", g, x)[..., None]
    dx = g / r - x * dot / (x.shape[-1] * r**3)
    return dx, torch.einsum("bi,bi->i", dy.reshape(-1, x.shape[-1]), (x / r).reshape(-1, x.shape[-1]))
