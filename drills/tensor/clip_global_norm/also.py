import torch


def clip_global_norm(gradients, max_norm):
    flat = [g.reshape(-1).to(torch.float32) for g in gradients if g is not None]
    norm = torch.linalg.vector_norm(torch.cat([torch.zeros(1), *flat]))
    found = []
    for g in gradients:
        if g is None:
            found.append(None)
        elif not torch.isfinite(norm):
            found.append(g.new_zeros(g.shape))
        elif norm <= max_norm:
            found.append(g.clone())
        else:
            found.append((g.float() / norm * max_norm).to(g.dtype))
    return found, norm
