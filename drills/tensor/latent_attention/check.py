import torch

from finetune.drills.cases import Case, Largest

LARGE = "tensor larger than the cache and w_k"


def drive(code, *args, memory=False):
    with Largest() as most:
        found = code.latent_attention(*args)
    limit = max(args[2].numel() + args[3].numel(), args[4].numel())
    return {"result": found, LARGE: most.elements > limit} if memory else found


def reference(q_nope, q_rope, latents, k_rope, w_k, w_v, memory=False):
    tq, tk, h = len(q_nope), len(latents), len(w_k)
    keys = torch.cat([torch.einsum("hnr,kr->khn", w_k, latents), k_rope[:, None].expand(-1, h, -1)], -1)
    values = torch.einsum("hvr,kr->khv", w_v, latents)
    q = torch.cat([q_nope, q_rope], -1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) / q.shape[-1] ** 0.5
    hidden = torch.ones(tq, tk, dtype=torch.bool).triu(tk - tq + 1)
    out = torch.einsum("hqk,khv->qhv", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
    return {"result": out, LARGE: False} if memory else out


def cases(draw):
    def made(tq, tk, h, dn, dr, dv, r, make=draw.normal):
        shapes = ((tq, h, dn), (tq, h, dr), (tk, r), (tk, dr), (h, dn, r), (h, dv, r))
        return [make(*shape) for shape in shapes]

    yield Case("one of everything", made(1, 1, 1, 1, 1, 1, 1), grad=True)
    yield Case("two tokens, one head", made(2, 2, 1, 2, 1, 2, 2), grad=True)
    yield Case("three tokens, two heads", made(3, 3, 2, 2, 3, 4, 3), grad=True)
    yield Case("one query, five tokens", made(1, 5, 2, 4, 2, 3, 6), grad=True)
    yield Case("two queries, five tokens", made(2, 5, 3, 4, 2, 5, 6), grad=True)
    yield Case("large scores", [x * 4 for x in made(4, 4, 2, 4, 2, 4, 4)], length=10_000)
    yield Case("not contiguous", made(3, 7, 2, 4, 2, 4, 6, draw.strided), grad=True, length=200)
    yield Case("memory: one query, 64 tokens", made(1, 64, 4, 16, 4, 16, 8), {"memory": True})
    yield Case("17 queries, 67 tokens", made(17, 67, 4, 16, 8, 16, 32), grad=True, length=1000)
