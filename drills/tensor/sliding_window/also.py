import torch


def sliding_window(q, k, v, window, slope=0.0):
    rows = []
    for i, query in enumerate(q):
        end = i + len(k) - len(q) + 1
        start = max(end - window, 0)
        bias = slope * torch.arange(start - end + 1, 1, dtype=q.dtype)
        rows.append(torch.softmax(k[start:end] @ query * q.shape[1] ** -0.5 + bias, 0) @ v[start:end])
    return torch.stack(rows)
