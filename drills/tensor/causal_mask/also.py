import torch


def attention(q, k, v):
    i = torch.arange(len(q))[:, None] + len(k) - len(q)
    seen = torch.arange(len(k)) <= i
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -1e30)
    p = torch.softmax(q @ k.mT * q.size(-1) ** -0.5 + bias, -1)
    return torch.einsum("ij,jd->id", p * seen, v)
