import bisect
import itertools


def accept(drafted, draft, target, uniforms):
    out = []
    weights = target[-1].tolist()
    for token, q, p, u in zip(drafted, draft.tolist(), target.tolist(), uniforms, strict=False):
        if not u < p[token] / q[token]:
            weights = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
            break
        out.append(token)
    sums = list(itertools.accumulate(weights))
    scale = sums[-1] if len(out) < len(drafted) else 1.0
    token = bisect.bisect_right(sums, uniforms[-1] * scale)
    return [*out, min(token, max(i for i, w in enumerate(weights) if w > 0))]
