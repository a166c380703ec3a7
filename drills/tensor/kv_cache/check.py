import torch

from finetune.drills.cases import Case


def drive(code, size, steps):
    """What each step of a script gives: a number of positions, tokens to store, or a query."""
    cache, found = code.KVCache(*size), []
    for step in steps:
        if isinstance(step, int):
            found.append(cache.positions(step))
        elif isinstance(step, torch.Tensor):
            found.append(cache.attend(step))
        else:
            try:
                cache.append(*step)
                found.append("stored")
            except ValueError:
                found.append("ValueError")
    return found


def reference(size, steps):
    batch, _, capacity, d = size
    rows, found = [[] for _ in range(batch)], []
    for step in steps:
        if isinstance(step, int):
            found.append(torch.tensor([[len(row) + i for i in range(step)] for row in rows]))
        elif isinstance(step, torch.Tensor):
            out = torch.zeros_like(step)
            for b, row in enumerate(rows):
                if row:
                    k, v = (torch.stack(x, 1) for x in zip(*row, strict=True))
                    out[b] = (step[b] @ k.mT / d**0.5).softmax(-1) @ v
            found.append(out)
        else:
            k, v, counts = step
            full = any(len(row) + int(n) > capacity for row, n in zip(rows, counts, strict=True))
            found.append("ValueError" if full else "stored")
            for b, n in enumerate([] if full else counts.tolist()):
                rows[b] += [(k[b, :, i], v[b, :, i]) for i in range(n)]
    return found


def cases(draw):
    def new(size, t, counts, make=draw.normal):
        batch, heads, _, d = size
        return make(batch, heads, t, d), make(batch, heads, t, d), torch.tensor(counts)

    def query(size):
        return draw.normal(size[0], size[1], 1, size[3])

    size = (1, 1, 4, 2)
    yield Case("an empty cache", [size, [2, query(size), 1]])
    yield Case("one token", [size, [new(size, 1, [1]), 2, query(size)]])
    yield Case("three tokens, then one", [size, [new(size, 3, [3]), 1, query(size), new(size, 1, [1]), query(size)]])
    size = (2, 2, 6, 3)
    yield Case("rows of three and one token", [size, [new(size, 4, [3, 1]), 2, query(size)]])
    yield Case(
        "rows of different lengths, appended to",
        [size, [new(size, 3, [3, 1]), new(size, 2, [1, 2]), 1, query(size), new(size, 1, [1, 1]), 1, query(size)]],
    )
    yield Case(
        "nothing new for one row", [size, [new(size, 2, [2, 0]), 1, query(size), new(size, 1, [0, 1]), query(size)]]
    )
    yield Case("just full", [size, [new(size, 6, [6, 2]), query(size), new(size, 1, [0, 1]), 1, query(size)]])
    full = [new(size, 5, [5, 2]), new(size, 2, [2, 1]), 1, query(size), new(size, 1, [1, 1]), query(size)]
    yield Case("one row over its capacity", [size, full])
    back = [new(size, 5, [2, 5]), new(size, 2, [1, 2]), 1, query(size), new(size, 1, [1, 1]), query(size)]
    yield Case("the second row over its capacity", [size, back])
    yield Case("not contiguous", [size, [new(size, 3, [2, 3], draw.strided), 1, query(size)]])
    size = (3, 2, 67, 16)
    yield Case("up to 60 tokens", [size, [new(size, 31, [31, 7, 30]), new(size, 29, [29, 29, 0]), 3, query(size)]])
