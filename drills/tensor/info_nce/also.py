import torch


def cosines(a, b):
    return (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).T


def info_nce(images, texts, log_scale):
    s = cosines(images, texts) * log_scale.exp()
    diagonal = s.diagonal()
    return 0.5 * ((s.logsumexp(0) - diagonal).mean() + (s.logsumexp(1) - diagonal).mean())


def siglip(images, texts, log_scale, bias):
    s = cosines(images, texts) * torch.exp(log_scale) + bias
    total = torch.logaddexp(s, torch.zeros_like(s)).sum() - s.diagonal().sum()
    return total / images.shape[0]
