import torch


def grpo_loss(logp, old_logp, reference_logp, advantages, mask, beta, low, high, tokens):
    total = 0
    for i, row in enumerate(mask):
        new, old, ref = logp[i, row], old_logp[i, row].detach(), reference_logp[i, row].detach()
        a = advantages[i].item()
        ratio = torch.exp(new - old)
        surrogate = ratio.clamp(max=1 + high) if a > 0 else ratio.clamp(min=1 - low)
        kl = torch.expm1(ref - new) - (ref - new)
        total = total + (beta * kl - a * surrogate).sum()
    return total / tokens
