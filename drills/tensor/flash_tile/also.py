import torch


def flash_attention(q, k, v, block_q, block_k, causal=False):
    shift = len(k) - len(q)
    outs, logs = [], []
    for first, rows in zip(range(0, len(q), block_q), q.split(block_q), strict=True):
        lse = torch.full_like(rows[:, 0], -torch.inf)
        out = torch.zeros_like(rows)
        for start, keys, values in zip(range(0, len(k), block_k), k.split(block_k), v.split(block_k), strict=True):
            s = rows @ keys.T / q.shape[1] ** 0.5
            if causal:
                ok = torch.ones_like(s, dtype=torch.bool).tril(first + shift - start)
                s = torch.where(ok, s, -torch.inf)
            part = torch.logsumexp(s, 1)
            mean = torch.softmax(s, 1).nan_to_num(0.0) @ values
            both = torch.logaddexp(lse, part)
            old, new = ((x - both).exp().nan_to_num(0.0)[:, None] for x in (lse, part))
            out, lse = out * old + mean * new, both
        outs.append(out)
        logs.append(lse)
    return torch.cat(outs), torch.cat(logs)
