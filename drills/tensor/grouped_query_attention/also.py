import torch


def grouped_query_attention(q, k, v):
    tq, tk = q.shape[2], k.shape[2]
    late = torch.arange(tk) > torch.arange(tk - tq, tk)[:, None]
    groups = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bhgqd,bhkd->bhgqk", groups, k) * q.shape[-1] ** -0.5
    scores = scores + torch.zeros_like(late, dtype=q.dtype).masked_fill(late, -torch.inf)
    return torch.einsum("bhgqk,bhkd->bhgqd", torch.softmax(scores, -1), v).flatten(1, 2)
