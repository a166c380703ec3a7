import torch

from finetune.drills.cases import Case, Largest


def forward(q, k, v, causal):
    scores = q @ k.T / q.shape[1] ** 0.5
    if causal:
        hidden = torch.ones_like(scores).triu(len(k) - len(q) + 1).bool()
        scores = scores.masked_fill(hidden & ~hidden.all(1, keepdim=True), -torch.inf)
        empty = hidden.all(1)
        lse = scores.logsumexp(1).masked_fill(empty, -torch.inf)
        return (scores.softmax(1) @ v).masked_fill(empty[:, None], 0.0), lse
    return scores.softmax(1) @ v, scores.logsumexp(1)


def drive(code, q, k, v, out, lse, dout, block, causal=False, memory=False):
    with Largest() as most:
        found = code.attention_backward(q, k, v, out, lse, dout, block, causal)
    found = dict(zip(("dq", "dk", "dv"), found, strict=True))
    return found | {"a tensor as large as the scores": most.elements >= len(q) * len(k)} if memory else found


def reference(q, k, v, out, lse, dout, block, causal=False, memory=False):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    found = torch.autograd.grad(forward(q, k, v, causal)[0], (q, k, v), dout)
    found = dict(zip(("dq", "dk", "dv"), found, strict=True))
    return found | {"a tensor as large as the scores": False} if memory else found


def cases(draw):
    def made(tq, tk, d, block, causal=False, make=draw.normal, scale=1.0):
        q, k, v = make(tq, d) * scale, make(tk, d), make(tk, d)
        out, lse = forward(q.double(), k.double(), v.double(), causal)
        return [q, k, v, out.float(), lse.float(), make(tq, d), block]

    causal = {"causal": True}
    yield Case("one query, two keys, one tile", made(1, 2, 2, 2), length=200)
    yield Case("two queries, three keys, one tile", made(2, 3, 2, 3), length=200)
    yield Case("two tiles", made(2, 4, 3, 2), length=200)
    yield Case("tiles that do not divide", made(3, 7, 4, 3), length=200)
    yield Case("causal", made(4, 4, 4, 2, True), causal, length=200)
    yield Case("causal, fewer queries than keys", made(3, 7, 4, 2, True), causal, length=200)
    yield Case("causal, more queries than keys", made(5, 2, 4, 1, True), causal, length=200)
    yield Case("large scores", made(4, 6, 4, 4, scale=10.0), length=1000)
    yield Case("not contiguous", made(7, 13, 16, 4, True, draw.strided), causal, length=200)
    yield Case("memory: tiles of 16", made(64, 64, 8, 16), {"memory": True}, length=200)
    yield Case("67 queries, 131 keys", made(67, 131, 32, 32, True), causal, length=200)
