"""A learning rate that warms up and then falls along a cosine.

step counts from 0; warmup ≥ 0, total > warmup → float.
step < warmup: peak·(step + 1) / (warmup + 1), so that the first step already learns.
warmup ≤ step < total: from peak at step = warmup along half a cosine, which would reach floor at step = total:
floor + (peak − floor)·(1 + cos(π·t)) / 2 with t = (step − warmup) / (total − warmup).
step ≥ total: floor.

    >>> [cosine_schedule(step, warmup=1, total=5, peak=1.0, floor=0.0) for step in (0, 1, 3, 5, 9)]
    [0.5, 1.0, 0.5, 0.0, 0.0]
"""

import math


def cosine_schedule(step: int, warmup: int, total: int, peak: float, floor: float) -> float:
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= total:
        return floor
    t = (step - warmup) / (total - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * t)) / 2
