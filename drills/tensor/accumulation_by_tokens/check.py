import torch

from finetune.drills.cases import Case


def drive(code, w, shards):
    """The mean over the ranks, as the all-reduce gives it."""
    tokens = sum(int(counts.sum()) for batches in shards for _, _, counts in batches)
    found = [code.rank_gradient(w, batches, tokens, len(shards)) for batches in shards]
    assert all(g.shape == w.shape and g.dtype == w.dtype for g in found), "a gradient has the shape and type of w"
    return torch.stack(found).mean(0)


def cases(draw):
    def batch(d, kept):
        counts = torch.tensor(kept, dtype=torch.bool)
        return draw.normal(len(kept), d), draw.normal(len(kept)), counts

    w1, w3 = draw.normal(1), draw.normal(3)
    yield Case("one token", [w1, [[batch(1, [1])]]], length=100)
    yield Case("three tokens", [w3, [[batch(3, [1, 1, 1])]]], length=100)
    yield Case("two micro-batches alike", [w3, [[batch(3, [1, 1]), batch(3, [1, 1])]]], length=100)
    yield Case("micro-batches of 1 and 4 tokens", [w3, [[batch(3, [1]), batch(3, [1, 1, 1, 1])]]], length=100)
    yield Case("padding in one of them", [w3, [[batch(3, [1, 0, 0]), batch(3, [1, 1, 1])]]], length=100)
    yield Case("a micro-batch of padding", [w3, [[batch(3, [0, 0]), batch(3, [1, 1])]]], length=100)
    yield Case("nothing counts", [w3, [[batch(3, [0, 0]), batch(3, [0])]]])
    yield Case("two ranks alike", [w3, [[batch(3, [1, 1])], [batch(3, [1, 1])]]], length=100)
    yield Case("ranks of 1 and 4 tokens", [w3, [[batch(3, [1])], [batch(3, [1, 1, 1, 1])]]], length=100)
    mixed = [[batch(3, [1, 0, 1]), batch(3, [1])], [batch(3, [0, 0])], [batch(3, [1, 1, 1, 1]), batch(3, [0, 1])]]
    yield Case("three ranks, one without tokens", [w3, mixed], length=100)
    yield Case("a rank without micro-batches", [w3, [[batch(3, [1, 1])], []]], length=100)
    many = [[batch(16, draw.flags(37).tolist()) for _ in range(3)] for _ in range(4)]
    yield Case("four ranks of three micro-batches", [draw.normal(16), many], length=500)
