import torch
from torch.nn.functional import softplus


def length_normalized_dpo(policy, reference, mask, beta):
    return simpo(policy - reference.detach(), mask, beta, 0.0)


def simpo(policy, mask, beta, gamma):
    zero = policy.new_zeros(())
    losses = []
    for i in range(policy.shape[1]):
        chosen, rejected = (policy[k, i][mask[k, i]] for k in (0, 1))
        m = (chosen.mean() if len(chosen) else zero) - (rejected.mean() if len(rejected) else zero)
        losses.append(softplus(gamma - beta * m))
    return torch.stack(losses).mean()
