import torch


def kl_divergence(p, q):
    def cross(a, b):
        weights, logs = torch.softmax(a, -1), torch.log_softmax(b, -1)
        return -(weights * logs.masked_fill(a == -torch.inf, 0.0)).sum(-1)

    return cross(p, q) - cross(p, p), cross(q, p) - cross(q, q)
