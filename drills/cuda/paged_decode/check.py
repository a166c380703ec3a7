import torch

from finetune.drills.cases import Case
from finetune.drills.compiled import launch


def drive(code, q, keys, values, table, lengths):
    return launch(code, [q, keys, values, table, lengths], [tuple(q.shape)], [len(q), table.shape[1]])


def reference(q, keys, values, table, lengths):
    rows = []
    for s, length in enumerate(lengths.tolist()):
        blocks = table[s, : -(-length // 16)].long()
        k, v = (x[blocks].reshape(-1, 32)[:length] for x in (keys, values))
        rows.append((k @ q[s] / 32**0.5).softmax(0) @ v)
    return torch.stack(rows)


def cases(draw):
    for name, lengths in (
        ("one token", [1]),
        ("no token", [0]),
        ("a whole block", [16]),
        ("a token more than a block", [17]),
        ("three sequences", [3, 0, 33]),
        ("five sequences", [50, 7, 32, 31, 64]),
    ):
        most = max(1, -(-max(lengths) // 16))
        blocks = len(lengths) * most + 2
        order = torch.randperm(blocks, generator=draw.generator)[: len(lengths) * most].view(len(lengths), most).int()
        for s, length in enumerate(lengths):
            order[s, -(-length // 16) :] = 1 << 30  # nothing may be read there
        parts = [draw.normal(len(lengths), 32), draw.normal(blocks, 16, 32), draw.normal(blocks, 16, 32)]
        yield Case(name, [*parts, order, torch.tensor(lengths, dtype=torch.int32)], length=64)
