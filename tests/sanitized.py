"""Run by kernels/test_cuda.py in a process that was started with libasan: each kernel's smallest samples, or one op's
with a deliberate fault, under AddressSanitizer and UndefinedBehaviorSanitizer. A line per op; a finding ends it."""

import sys

from finetune import ops
from finetune.kernels import emulator, faults
from finetune.ops._check import run

controls = emulator.load("sanitized")
if len(sys.argv) > 1:  # a deliberate fault: the sanitizer must end this
    controls.set_bug(sys.argv[1])
for op in [sys.argv[1].partition(".")[0]] if len(sys.argv) > 1 else faults.kernels():
    calls = 0
    for sample, dtype in faults.cases(op):
        if calls < 9 and not ops.REGISTRY[op].why_not("sanitized", *sample.cast(dtype), **sample.kwargs):
            run(op, sample, dtype, "sanitized")
            calls += 1
    print(op, calls, flush=True)
