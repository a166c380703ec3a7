import torch


def beam_search(step, start, end, width, steps, alpha):
    sequences, sums, ended = [[start]], torch.zeros(1, dtype=torch.float64), []
    for n in range(1, steps + 1):
        totals = sums[:, None] + torch.stack([step(s) for s in sequences]).double()
        values, places = totals.flatten().topk(min(width, totals.numel()))
        parents, tokens = places // totals.shape[1], places % totals.shape[1]
        grown = [(sequences[p] + [t], v) for p, t, v in zip(parents.tolist(), tokens.tolist(), values, strict=True)]
        ended += [(float(v) / n**alpha, s) for s, v in grown if s[-1] == end]
        alive = [(s, v) for s, v in grown if s[-1] != end]
        if not alive:
            break
        sequences, sums = [s for s, _ in alive], torch.stack([v for _, v in alive])
    else:
        ended += [(float(v) / n**alpha, s) for s, v in alive]
    score, best = max(ended)
    return best[1:], score
