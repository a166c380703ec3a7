import torch

from finetune.drills.cases import Case


def drive(code, table, start, end, width, steps, alpha):
    """table (v, v, v): log probabilities after the last two tokens."""

    def step(tokens):
        return table[tokens[-2] if len(tokens) > 1 else tokens[-1], tokens[-1]]

    return code.beam_search(step, start, end, width, steps, alpha)


def cases(draw):
    def table(v, scale=1.0, end=0.0):
        logits = draw.normal(v, v, v, scale=scale)
        logits[..., 0] += end
        return logits.log_softmax(-1)

    yield Case("one step, width 1", [table(3), 2, 0, 1, 1, 0.0])
    yield Case("three steps, width 1", [table(3, end=-3), 2, 0, 1, 3, 0.0])
    trap = torch.tensor([[0.2, 0.4, 0.4], [0.02, 0.55, 0.43], [0.01, 0.98, 0.01]])
    trap = trap.expand(3, 3, 3).clone()
    trap[:, 0] = torch.tensor([0.05, 0.5, 0.45])
    yield Case("the best start is not the best sequence", [trap.log(), 0, 0, 2, 2, 0.0])
    for i in range(3):
        yield Case(f"width 2, four steps, {i + 1}", [table(4, end=-0.5), 1, 0, 2, 4, 0.0])
    for i in range(3):
        yield Case(f"alpha 1, {i + 1}", [table(4, 1.5), 1, 0, 3, 5, 1.0])
    yield Case("the end is probable", [table(4, end=3), 1, 0, 2, 6, 0.7])
    yield Case("the end is improbable", [table(4, end=-6), 1, 0, 2, 6, 0.7])
    for i in range(3):
        yield Case(f"long ones win, {i + 1}", [table(4, end=0.5), 1, 0, 3, 4, 2.0])
    yield Case("wider than the vocabulary", [table(2), 1, 0, 5, 3, 0.6])
    for i in range(3):
        yield Case(f"v 13, width 4, {i + 1}", [table(13, 1.5, end=1), 5, 0, 4, 7, 1.2])
