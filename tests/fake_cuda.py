"""Run by kernels/test_gpu_check.py: torch's baselines in benches/ on CUDA tensors without a GPU. A line per fault.

torch's fake tensors have a device and no data, so what would mix CPU and CUDA tensors on a GPU is an error here too.
They ask for a device guard, which a CPU build of torch lacks: argv[1] is a library with one that does nothing.
"""

import sys

import torch
from baselines import BASELINES
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_map_only

from finetune import ops
from finetune.ops._check import flat
from finetune.ops.quantized_linear import QuantizedWeight

torch.ops.load_library(sys.argv[1])


def on_gpu(mode, args, dtype):
    def one(t):
        kept = dtype if t.dtype == torch.float64 else t.dtype
        return FakeTensor(
            mode, torch.empty_strided(t.shape, t.stride(), dtype=kept, device="meta"), torch.device("cuda:0")
        )

    args = tree_map_only(QuantizedWeight, lambda weight: weight.mapped(one), args)
    return tree_map_only(torch.Tensor, one, args)


checked = 0
for op, page in ops.REGISTRY.items():
    for sample in page.samples():
        if sample.bench or not all(leaf.numel() for leaf in flat(sample.args)):  # the code is the same on small ones
            continue
        # code books are constants of their modules
        mode = FakeTensorMode(allow_non_fake_inputs=op in ("adamw8bit", "quantized_linear"))
        args = on_gpu(mode, sample.args, torch.bfloat16)
        kwargs = {name: on_gpu(mode, arg, torch.bfloat16) for name, arg in sample.kwargs.items()}
        with mode, torch.no_grad():
            ways = BASELINES[op](*args, **kwargs)
            for label, call in ways.items():
                try:
                    wrong = [leaf.device for leaf in flat(call()) if leaf.device.type != "cuda"]
                except (DataDependentOutputException, DynamicOutputShapeException):
                    continue  # it asks for a value, which a fake tensor has not
                except (RuntimeError, AssertionError) as error:
                    wrong = [str(error).splitlines()[0]]
                if wrong:
                    print(f"{op}, {sample.name}, {label}: {wrong}")
                checked += 1
assert checked >= len(ops.REGISTRY)
