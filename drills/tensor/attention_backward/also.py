import torch


def attention_backward(q, k, v, out, lse, dout, block, causal=False):
    shift, root = len(k) - len(q), q.shape[1] ** 0.5
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    dq, parts = 0, []
    for j, (kb, vb) in enumerate(zip(k.split(block), v.split(block), strict=True)):
        s = torch.einsum("id,jd->ij", q, kb) / root
        if causal:
            s = s.masked_fill(torch.ones_like(s).triu(shift - j * block + 1).bool(), -torch.inf)
        p = torch.exp(s - lse.unsqueeze(1))
        ds = p * (dout @ vb.T - torch.einsum("id,id->i", dout, out)[:, None]) / root
        dq = dq + ds @ kb
        parts.append((torch.einsum("ij,id->jd", ds, q), torch.einsum("ij,id->jd", p, dout)))
    return dq, torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])
