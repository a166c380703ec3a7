"""The cells of `python -m finetune bench` for pytest-benchmark, with its statistics, JSON and comparison:

    pytest benches --benchmark-group-by=group [--benchmark-json=FILE] [--benchmark-compare]

A group is one op on one sample in one dtype; its rows are our backends and torch's own ways. A backend that is wrong
fails before it is timed.
"""

import harness
import pytest
import torch
from harness import sides
from timing import roofs

from finetune import ops
from finetune.ops._backends import device_for
from finetune.ops._check import check

BACKENDS = ("cpp", "cuda", "triton") if torch.cuda.is_available() else ("cpp",)
CELLS = [
    pytest.param(cell, id="-".join((cell.op, cell.sample, cell.work, cell.dtype, cell.backend)))
    for cell in harness.cells(list(ops.REGISTRY), [], list(harness.DTYPES), list(BACKENDS), [torch.get_num_threads()])
]


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("cell", CELLS)
def test_op(benchmark, cell, who):
    sample, dtype = harness.bench_samples(cell.op)[cell.sample], harness.DTYPES[cell.dtype]
    device = device_for(cell.backend)
    if reason := ops.REGISTRY[cell.op].why_not(cell.backend, *sample.cast(dtype, device), **sample.options(device)):
        pytest.skip(reason)
    check(cell.op, sample, dtype, cell.backend)
    backward = cell.work != "forward"
    ours, others = sides(cell.op, sample, dtype, cell.backend, backward)
    label, side = ("ours", ours) if who == "ours" else min(others.items(), key=lambda item: item[1].time(2))
    benchmark.group = f"{cell.op}, {cell.sample}, {cell.work}, {cell.dtype}, {cell.backend}"

    def call():
        side.call()
        side.settle()

    benchmark.pedantic(call, setup=side.reset, rounds=10, warmup_rounds=2)
    if backward or not sample.grad:
        moved, median = harness.traffic(sample, dtype), benchmark.stats.stats.median
        copy, product = roofs(moved, dtype, device_for(cell.backend))
        benchmark.extra_info |= {
            "side": label,
            "bytes_per_second": moved / median,
            "copy_bytes_per_second": copy,
            "flops_per_second": sample.flops / median,
            "product_flops_per_second": product,
        }
