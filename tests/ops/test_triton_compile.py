"""Every Triton kernel compiled for GPUs that are not here, at the sizes that models have: no spills, and shared memory
that the target has. tests/triton_compile.py does it, in a process that does not interpret; build/triton keeps the
results.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import ops
from finetune.ops import _triton

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
KERNELS = {op for op in ops.REGISTRY if (_triton.KERNELS / f"{op}.py").exists()}
SHARED = {"cuda:80": 163, "cuda:90": 227, "cuda:100": 227, "cuda:120": 99, "hip:gfx942": 64}  # KiB a block may have


def compile_for(target, dtypes, *wanted):
    command = [sys.executable, ROOT / "tests/triton_compile.py", target, dtypes, *wanted]
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    return [json.loads(line) for line in out.stdout.splitlines()]


def check(rows, target, dtypes):
    assert {(row["op"], row["dtype"]) for row in rows} == {(op, dtype) for op in KERNELS for dtype in dtypes}
    too_much = [row for row in rows if row["shared"] > 1024 * SHARED[target] or row.get("spilled")]
    assert not too_much, "\n".join(map(str, too_much))


@pytest.fixture(scope="module")
def for_hopper():
    return compile_for("cuda:90", "bfloat16")


def test_bfloat16_for_hopper(for_hopper):
    check(for_hopper, "cuda:90", {"bfloat16"})


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", SHARED)
def test_every_dtype_for(target):
    dtypes = ("float32", "bfloat16", "float16")
    check(compile_for(target, ",".join(dtypes)), target, dtypes)


# Elements of a program, and bytes an element that it loads and stores where the tensors are bfloat16.
# adamw8bit's threads have four elements, 8 bytes of bfloat16; its codes and masks go besides.
LISTS = {
    ("adamw", "adamw_kernel", False): (2048, 2 + 2 + 4 + 4, 2 + 4 + 4),
    ("adamw", "adamw_kernel", True): (2048, 2 + 4 + 4 + 4, 2 + 4 + 4 + 4),
    ("clip_grad_norm", "squares_kernel", None): (4096, 2, 0),
    ("clip_grad_norm", "scale_kernel", None): (4096, 2, 2),
    ("global_norm", "squares_kernel", None): (4096, 2, 0),
    ("unscale_check_finite", "unscale_kernel", None): (4096, 2, 2),
}


def test_kernels_over_lists_move_16_bytes_a_thread(for_hopper):
    """The branch of whole blocks moves all its elements in accesses of 16 bytes; what is narrower is the masked
    branch's and the table's. Before there was such a branch, nothing was wider than 8 bytes."""
    seen = set()
    for row in for_hopper:
        masters = bool(row["constants"][2]) if row["op"] == "adamw" else None
        want = LISTS.get(key := (row["op"], row["kernel"], masters))
        if not want:
            continue
        seen.add(key)
        elements, *moved = want
        for kind, bytes_an_element in zip(("ld", "st"), moved, strict=True):
            wide = row["accesses"][kind].get("16", 0) * 16 * 32 * row["num_warps"]
            assert wide == elements * bytes_an_element, (row["op"], row["kernel"], kind, row["accesses"])
    assert seen == set(LISTS)
    eight_bit = [row["accesses"] for row in for_hopper if row["kernel"] == "adamw8bit_kernel"]
    assert all(row["ld"].get("8", 0) >= 2 and row["st"].get("8", 0) >= 1 for row in eight_bit)


def test_tensor_core_products_of_attention_are_wide(for_hopper):
    """In columns; before Hopper had tiles of its own, D = 128 had 32 forward and 16 backward."""
    found = {}
    for row in for_hopper:
        if (
            row["op"] == "attention"
            and row["kernel"] != "delta_kernel"
            and (dim := row["constants"][-1]) >= 64
            and row["constants"][-6:-3] == [False] * 3  # a mask, a window and a softcap have smaller tiles
            and row["wgmma"]
        ):
            found.setdefault((row["kernel"], dim), set()).add(min(row["wgmma"]))
    queries, keys = (f"attention_backward_{side}_kernel" for side in ("queries", "keys"))
    assert found == {
        **{("attention_kernel", dim): {64} for dim in (64, 128, 256)},
        **{(queries, dim): {64} for dim in (64, 128)},
        (keys, 64): {64},
        (keys, 128): {32},
    }


def test_every_kernel_is_compiled(for_hopper):
    """`typical` must launch all of a file's kernels, or the tests above say nothing of the others."""
    launched = {(row["op"], row["kernel"]) for row in for_hopper}
    for op in KERNELS:
        source = (_triton.KERNELS / f"{op}.py").read_text()
        kernels = {line.split("def ")[1].split("(")[0] for line in source.splitlines() if line.startswith("def ")}
        kernels = {name for name in kernels if name.endswith("_kernel")}
        if not kernels:
            assert re.search(r"^from \.[a-z]", source, re.MULTILINE), f"{op} has no kernel at all"
        assert kernels <= {name for known, name in launched if known == op}
