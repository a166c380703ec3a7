"""Compiles the Triton kernels for GPUs that are not here: python tests/triton_compile.py TARGET DTYPES [OP …] → JSON
lines.

TARGET is cuda:80, cuda:90, cuda:100, cuda:120 or hip:gfx942, DTYPES like float32,bfloat16. The launchers run as they
are, with a driver that only names the target, on the calls that each file's `typical` yields: so what is compiled has
the signatures, specializations, block sizes and warps of real launches. A line a kernel: op, kernel, what tells the
variants apart, and shared, registers, spilled bytes, accesses by their width and columns of Hopper's tensor core
products where the tools tell. TRITON_INTERPRET must not be 1.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "triton"))


class Driver:
    """What a launch asks of triton's driver before it compiles."""

    def __init__(self, target):
        self.get_current_target = lambda: target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launches(op, dtype):
    """(kernel, source, options) of everything the op's typical calls launch; a variant once."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from finetune.ops import _triton

    module, found = _triton.kernels(op), {}

    def record(kernel, key, signature, device, constants, options, attributes, warmup):  # instead of compiling
        source = ASTSource(kernel, signature, constants, attributes)
        chosen = {name: getattr(options, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        found[kernel.__name__, key] = (kernel.__name__, source, chosen)  # None: nothing to launch

    JITFunction._do_compile = record
    for operator, args in module.typical(dtype):
        module.OPERATORS[operator](*args)
    return found.values()


def usage(kernel: bytes) -> dict[str, int]:
    """Registers and bytes of stack (spills) by cuobjdump."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    (registers, stack), *_ = re.findall(r"REG:(\d+) STACK:(\d+)", out.stdout + out.stderr)
    return {"registers": int(registers), "spilled": int(stack)}


def accesses(ptx: str) -> dict[str, dict[str, int]]:
    """How many loads from and stores to global memory a thread's program has, by the bytes that one moves."""
    found: dict[str, dict[str, int]] = {"ld": {}, "st": {}}
    for kind, many, bits in re.findall(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx):
        width = str(int(many or 1) * int(bits) // 8)
        found[kind][width] = found[kind].get(width, 0) + 1
    return found


def main(name: str, dtypes: str, *wanted: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from finetune.ops import REGISTRY, _triton

    backend, arch = name.split(":")
    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    triton.runtime.driver.set_active(Driver(target))
    for op in wanted or [op for op in REGISTRY if (_triton.KERNELS / f"{op}.py").exists()]:
        for dtype in dtypes.split(","):
            for kernel, source, options in launches(op, getattr(torch, dtype)):
                compiled = triton.compile(source, target=target, options=options)
                row = {"op": op, "kernel": kernel, "dtype": dtype, **options}
                row["constants"] = [v if isinstance(v, int) else str(v) for v in source.constants.values()]
                row["shared"] = compiled.metadata.shared
                if backend == "cuda":
                    row |= usage(compiled.asm["cubin"]) | {"accesses": accesses(compiled.asm["ptx"])}
                    columns = re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k", compiled.asm["ptx"])
                    row["wgmma"] = sorted(set(map(int, columns)))
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
