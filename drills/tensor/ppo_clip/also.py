import torch


def ppo_loss(logp, old_logp, advantages, mask, low, high):
    if not mask.any():
        return torch.zeros_like(logp).sum(), torch.zeros(())
    difference = torch.where(mask, logp - old_logp.detach(), 0.0)
    a = torch.where(mask, advantages.detach(), 0.0)
    ratio = torch.exp(torch.where(mask, difference, torch.zeros_like(difference)))
    bound = torch.where(a > 0, torch.full_like(ratio, 1 + high), torch.full_like(ratio, 1 - low))
    held = ((a > 0) & (ratio > bound)) | ((a < 0) & (ratio < bound))
    loss = -(torch.where(held, bound, ratio) * a).sum() / mask.sum()
    return loss, (held & mask).float().sum() / mask.float().sum()
