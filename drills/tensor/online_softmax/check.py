import torch

from finetune.drills.cases import Case


def drive(code, scores, values, sizes, parts=1):
    """The result of blocks of these sizes, dealt to `parts` states that are then merged from the left."""
    states = [code.start(len(scores), values.shape[1]) for _ in range(parts)]
    if scores.dtype == torch.float64:
        states = [tuple(x.double() for x in state) for state in states]
    for i, (s, v) in enumerate(zip(scores.split(sizes, 1), values.split(sizes), strict=True)):
        states[i % parts] = code.update(states[i % parts], s, v)
    state = states[0]
    for other in states[1:]:
        kept = [x.clone() for x in (*state, *other)]
        merged = code.merge(state, other)
        assert all(torch.equal(x, y) for x, y in zip(kept, (*state, *other), strict=True)), "merge changed a state"
        state = merged
    m, total, acc = state
    return {"m": m, "l": total, "acc": acc, "result": code.finish(state)}


def reference(scores, values, sizes, parts=1):
    m = scores.amax(1)
    weights = (scores - m.masked_fill(m == -torch.inf, 0.0)[:, None]).exp()
    return {
        "m": m,
        "l": weights.sum(1),
        "acc": weights @ values,
        "result": scores.softmax(1).nan_to_num(0.0) @ values,
    }


def cases(draw):
    inf = torch.inf
    yield Case("one score", [draw.normal(1, 1), draw.normal(1, 1), [1]])
    yield Case("one block of three", [draw.normal(1, 3), draw.normal(3, 2), [3]])
    yield Case("two blocks of one", [torch.tensor([[1.0, 3.0]]), draw.normal(2, 2), [1, 1]])
    yield Case("the first block is larger", [torch.tensor([[3.0, 1.0]]), draw.normal(2, 2), [1, 1]])
    yield Case("two rows, blocks of 2, 1, 3", [draw.normal(2, 6, scale=3), draw.normal(6, 4), [2, 1, 3]])
    yield Case("two parts merged", [draw.normal(2, 6, scale=3), draw.normal(6, 4), [2, 1, 3]], {"parts": 2})
    yield Case("scores near 1e4", [draw.normal(2, 4) + 1e4, draw.normal(4, 3), [2, 2]], length=100)
    yield Case("scores near −1e4", [draw.normal(2, 4) - 1e4, draw.normal(4, 3), [2, 2]], length=100)
    hidden = torch.tensor([[-inf, -inf, 1.0, 2.0], [1.0, 0.5, -inf, -inf]])
    yield Case("a block of a row is hidden", [hidden, draw.normal(4, 3), [2, 2]])
    yield Case("a part of a row is hidden", [hidden, draw.normal(4, 3), [2, 2]], {"parts": 2})
    nothing = torch.tensor([[-inf, -inf, -inf], [0.0, 1.0, 2.0]])
    yield Case("a row that sees nothing", [nothing, draw.normal(3, 2), [1, 2]])
    yield Case("a state without a block", [draw.normal(2, 3), draw.normal(3, 2), [3]], {"parts": 3})
    yield Case("not contiguous", [draw.strided(5, 13), draw.strided(13, 7), [4, 4, 5]], {"parts": 2})
    yield Case("1009 scores", [draw.normal(3, 1009, scale=2), draw.normal(1009, 8), [64] * 15 + [49]], {"parts": 4})
