import math

import torch


def filtered(logits, k, p, min_p):
    result = torch.empty_like(logits)
    for row, out in zip(logits.reshape(-1, logits.shape[-1]), result.view(-1, logits.shape[-1]), strict=True):
        kept = row.clone()
        if k:
            kept[row < sorted(row.tolist(), reverse=True)[min(k, len(row)) - 1]] = -torch.inf
        probabilities = torch.softmax(kept, 0)
        if p < 1.0:
            greater = (probabilities[None, :] > probabilities[:, None]).to(row.dtype) @ probabilities
            kept[greater >= p] = -torch.inf
        if min_p:
            kept[kept < kept.max() + math.log(min_p)] = -torch.inf
        out.copy_(kept)
    return result
