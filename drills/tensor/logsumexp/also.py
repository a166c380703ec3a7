import torch


def logsumexp(x):
    first = x.max(dim=-1).values
    rest = (x - first.nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1)).exp().sum(-1)
    return torch.where(first.isinf(), first, first + rest.log())
