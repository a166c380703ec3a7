import torch


def rank_gradient(w, batches, tokens, ranks):
    if tokens == 0:
        return w.new_zeros(w.shape)
    x = torch.cat([x[counts] for x, _, counts in batches] + [w.new_zeros(0, len(w))])
    y = torch.cat([y[counts] for _, y, counts in batches] + [w.new_zeros(0)])
    share = ranks / tokens
    return torch.einsum("n,nd->d", 2 * share * (torch.einsum("nd,d->n", x, w) - y), x)
