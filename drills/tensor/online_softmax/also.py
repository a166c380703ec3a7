import torch


def start(r, d):
    return torch.full((r,), -torch.inf), torch.zeros(r), torch.zeros(r, d)


def scale(old, new):
    return torch.where(old == -torch.inf, 0.0, (old - new).exp()).to(new)


def update(state, scores, values):
    m, total, acc = state
    for j in range(scores.shape[1]):
        new = torch.maximum(m, scores[:, j])
        keep, add = scale(m, new), scale(scores[:, j], new)
        m, total, acc = new, total * keep + add, acc * keep[:, None] + torch.outer(add, values[j])
    return m, total, acc


def merge(a, b):
    m = torch.stack([a[0], b[0]]).amax(0)
    ka, kb = scale(a[0], m), scale(b[0], m)
    return m, ka * a[1] + kb * b[1], ka[:, None] * a[2] + kb[:, None] * b[2]


def finish(state):
    return torch.nan_to_num(state[2] / state[1][:, None], nan=0.0)
