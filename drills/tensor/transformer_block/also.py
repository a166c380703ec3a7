import torch.nn.functional as F


def block(x, weights, pre):
    def normed(z, i):
        return F.rms_norm(z, z.shape[-1:], weights[f"norm{i}"], 1e-6)

    def heads(z):
        q, k, v = (F.linear(z, weights[n])[None] for n in ("wq", "wk", "wv"))
        return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0], weights["wo"])

    def wide(z):
        return F.linear(F.linear(z, weights["up"]).clamp(min=0), weights["down"])

    for i, layer in enumerate((heads, wide), 1):
        x = x + layer(normed(x, i)) if pre else normed(x + layer(x), i)
    return x
