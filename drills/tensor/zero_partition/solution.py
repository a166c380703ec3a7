"""How ZeRO shares parameters out among ranks.

partition(sizes, ranks): sizes is a list of the numbers of elements of the parameters, at least 0. All parameters, one
after another, are one flat vector, padded at the end to a multiple of ranks; rank r has the r-th of `ranks` equal
parts. → a list with an item for each rank: the list of (parameter, start, end) that it has, in order, where start and
end count within that parameter. Pieces without elements are not listed, and padding is in no piece.
state_bytes(parameters, ranks, stage): bytes of each rank for parameters in bfloat16 (2 bytes), gradients in bfloat16
and the optimizer's float32 master, momentum and variance (12 bytes), without padding, a float. Stage 0 shares nothing
out, 1 the optimizer's state, 2 also the gradients, 3 also the parameters.

    >>> partition([3, 4], ranks=2)
    [[(0, 0, 3), (1, 0, 1)], [(1, 1, 4)]]
    >>> [state_bytes(1000, 4, stage) for stage in range(4)]
    [16000.0, 7000.0, 5500.0, 4000.0]
"""


def partition(sizes: list[int], ranks: int) -> list[list[tuple[int, int, int]]]:
    part = -(-sum(sizes) // ranks)
    shares: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    first = 0
    for parameter, size in enumerate(sizes):
        for rank, share in enumerate(shares):
            start, end = max(rank * part - first, 0), min((rank + 1) * part - first, size)
            if start < end:
                share.append((parameter, start, end))
        first += size
    return shares


def state_bytes(parameters: int, ranks: int, stage: int) -> float:
    optimizer = 12 / (ranks if stage >= 1 else 1)
    gradients = 2 / (ranks if stage >= 2 else 1)
    values = 2 / (ranks if stage >= 3 else 1)
    return parameters * (optimizer + gradients + values)
