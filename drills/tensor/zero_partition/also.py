from itertools import groupby


def partition(sizes, ranks):
    flat = [(parameter, i) for parameter, size in enumerate(sizes) for i in range(size)]
    part = (len(flat) + ranks - 1) // ranks
    shares = []
    for rank in range(ranks):
        pieces = groupby(flat[rank * part : (rank + 1) * part], key=lambda each: each[0])
        places = [(parameter, [i for _, i in piece]) for parameter, piece in pieces]
        shares.append([(parameter, at[0], at[-1] + 1) for parameter, at in places])
    return shares


def state_bytes(parameters, ranks, stage):
    parts = [2, 2, 12]
    return float(sum(parameters * b / ranks if stage + i >= 3 else parameters * b for i, b in enumerate(parts)))
