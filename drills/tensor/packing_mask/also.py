import torch


def pack(documents, size):
    ids, labels, positions = [], [], []
    mask = torch.zeros(size, size, dtype=torch.bool)
    for document in documents:
        a, b = len(ids), len(ids) + len(document)
        mask[a:b, a:b] = torch.tril(torch.ones(b - a, b - a)) > 0
        ids += document
        labels += document[1:] + [-100] * (len(document) > 0)
        positions += range(len(document))
    rest = size - len(ids)
    rows = ids + [0] * rest, labels + [-100] * rest, positions + [0] * rest
    return (*(torch.tensor(row, dtype=torch.long) for row in rows), mask)
