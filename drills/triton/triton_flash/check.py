from finetune.drills.cases import Case


def reference(q, k, v):
    scores = q @ k.T / q.shape[1] ** 0.5
    hidden = scores.new_ones(scores.shape).triu(1).bool()
    return scores.masked_fill(hidden, -float("inf")).softmax(-1) @ v


def cases(draw):
    for t, d in ((1, 16), (2, 16), (15, 32), (16, 16), (17, 16), (40, 64)):
        yield Case(f"{t} tokens of {d}", [draw.normal(t, d) for _ in range(3)], length=d)
    yield Case("large scores", [draw.normal(35, 16, scale=4) for _ in range(3)], length=4000)
