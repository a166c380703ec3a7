"""Timing of two calls in turns, and the machine's measured peaks (copy bandwidth, matrix-product FLOPs)."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finetune.ops._check import flat

Call = Callable[[], Any]
ROUNDS = (5, 200)  # pairs a cell, at least and at most

# --- timing


@dataclass(frozen=True)
class Times:
    """Seconds a call."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(values: list[float]) -> Times:
        ordered = sorted(values)
        last = len(ordered) - 1
        return Times(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


@dataclass(frozen=True)
class Side:
    """One of the two that are compared. `reset` undoes what a call changed in place, off the clock."""

    call: Call
    reset: Call
    changed: list[torch.Tensor]
    settle: Call  # waits until the device has done what it was given
    on_gpu: bool = False

    def results(self) -> list[torch.Tensor]:
        self.reset()
        return [leaf.detach().clone() for leaf in [*flat(self.call()), *self.changed]]

    def time(self, repeats: int) -> float:
        if self.on_gpu:  # by the device's clock, queued one behind the other: the kernels' time, not that of launches
            self.reset()
            self.settle()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                self.call()
            end.record()
            self.settle()
            return begin.elapsed_time(end) / 1e3 / repeats
        total = 0.0
        for _ in range(repeats):
            self.reset()
            self.settle()
            start = time.perf_counter()
            result = self.call()
            self.settle()
            total += time.perf_counter() - start
            del result
        return total / repeats


def settle(device: str) -> Call:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def alternate(a: Side, b: Side, seconds: float) -> tuple[list[float], list[float]]:
    """Times of a and b in turn (a b, b a, …) for about `seconds`, after one call of each to warm up."""
    once = a.time(1) + b.time(1)
    repeats = max(1, int(1e-3 / once))  # a reading is worth about a millisecond: the clock and the caches settle
    least = ROUNDS[0] if once < 2 else 2  # some of torch's bfloat16 products take half a minute without AVX-512
    rounds = min(max(int(seconds / (once * repeats)), least), ROUNDS[1])
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                times[which].append((a, b)[which].time(repeats))
    finally:
        gc.enable()
    return times


# --- peaks, measured with the same threads in the same run


@functools.cache
def copy_rate(power: int, device: str, threads: int) -> float:
    """Bytes a second, read and written, of a copy of 2^power bytes: small ones come from the caches."""
    source = torch.ones(2**power // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 2**power / best(lambda: target.copy_(source), settle(device))


@functools.cache
def product_rate(dtype: torch.dtype, device: str, threads: int) -> float:
    """FLOPs a second of a matrix product: of fp32 on a CPU, where less is not always faster, of `dtype` on a GPU."""
    n, dtype = (1024, torch.float32) if device == "cpu" else (8192, dtype)
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return 2 * n**3 / best(lambda: torch.mm(a, b, out=out), settle(device))


def roofs(bytes_moved: float, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """(copy rate, product rate) for work that moves this many bytes, with the current thread count."""
    power = min(max(int(bytes_moved / 2).bit_length(), 16), 28)
    threads = torch.get_num_threads()
    return copy_rate(power, device, threads), product_rate(dtype, device, threads)


def best(call: Call, settled: Call, seconds: float = 0.3) -> float:
    call()
    settled()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        start = time.perf_counter()
        call()
        settled()
        times.append(time.perf_counter() - start)
    return min(times)
