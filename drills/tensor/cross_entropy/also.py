import torch


def cross_entropy(logits, targets):
    keep = (targets != -100).nonzero()[:, 0]
    gradient = torch.zeros_like(logits)
    if len(keep) == 0:
        return logits.new_zeros(()), gradient
    x, t = logits[keep], targets[keep]
    x = x - x.max(dim=1, keepdim=True).values
    p = x.exp() / x.exp().sum(1, keepdim=True)
    loss = (x.exp().sum(1).log() - x[torch.arange(len(t)), t]).mean()
    p[torch.arange(len(t)), t] -= 1
    gradient[keep] = p / len(keep)
    return loss, gradient
