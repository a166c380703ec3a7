import torch
import triton
import triton.language as tl


@triton.jit
def attention_kernel(q, k, v, o, t, D: tl.constexpr, KEYS: tl.constexpr):
    i = tl.program_id(0)  # one query a program
    c = tl.arange(0, D)
    own = tl.load(q + i * D + c) / tl.sqrt(D * 1.0)
    m = -float("inf")
    l = 0.0
    acc = tl.zeros([D], tl.float32)
    for start in range(0, i + 1, KEYS):
        j = start + tl.arange(0, KEYS)
        seen = j <= i
        keys = tl.load(k + j[:, None] * D + c[None, :], mask=seen[:, None], other=0.0)
        s = tl.where(seen, tl.sum(keys * own[None, :], 1), -float("inf"))
        new = tl.maximum(m, tl.max(s, 0))
        p = tl.exp(s - new)
        l = l * tl.exp(m - new) + tl.sum(p, 0)
        values = tl.load(v + j[:, None] * D + c[None, :], mask=seen[:, None], other=0.0)
        acc = acc * tl.exp(m - new) + tl.sum(values * p[:, None], 0)
        m = new
    tl.store(o + i * D + c, acc / l)


def attention(q, k, v):
    o = torch.empty_like(q)
    attention_kernel[(len(q),)](q, k, v, o, len(q), q.shape[1], 32)
    return o
