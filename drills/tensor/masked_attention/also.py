import torch


def attention(q, k, v, mask, bias=None):
    seen = mask.unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias[None]
    lowest = torch.finfo(scores.dtype).min
    weights = torch.softmax(torch.where(seen, scores, lowest), -1)
    return torch.einsum("bhqk,bhkd->bhqd", weights * seen, v)
