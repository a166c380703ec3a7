import torch


def layer_norm_backward(x, weight, dy, eps=1e-5):
    rows, out = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
    n = rows.shape[1]
    variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    std = (variance + eps).sqrt()
    c = rows - mean
    d_normed = torch.einsum("ij,j->ij", out, weight)
    d_variance = -0.5 * (d_normed * c).sum(1, keepdim=True) / std**3
    d_centered = d_normed / std + 2 * c * d_variance / n
    dx = d_centered - d_centered.sum(1, keepdim=True) / n
    return dx.reshape(x.shape), torch.einsum("ij,ij->j", out, c / std), torch.einsum("ij->j", out)
