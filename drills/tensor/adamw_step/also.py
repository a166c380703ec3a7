import torch


def adamw_step(p, g, m, v, step, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m = torch.lerp(m, g, 1 - beta1)
    v = torch.addcmul(v * beta2, g, g, value=1 - beta2)
    root = (1 - beta2**step) ** 0.5
    denominator = v.sqrt() / root + eps
    decayed = p - lr * weight_decay * p
    return torch.addcdiv(decayed, m, denominator, value=-lr / (1 - beta1**step)), m, v
