"""`python -m finetune kernels`, and what the trace of a kernel promises."""

import json

import pytest
import torch

from finetune import cli, ops
from finetune.kernels import emulator, faults
from finetune.ops._check import run


def test_trace_of_rms_norm(capsys):
    """Loads are 16 bytes a lane, and not a sector more than the rows have."""
    assert cli.main(["kernels", "trace", "rms_norm", "--shape", "3x512", "--forward", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    loads = [r for r in rows if r["kind"] == "global load" and r["file"] == "csrc/cuda/rms_norm.cu"]
    assert loads
    assert all(r["width"] == 16 for r in loads)
    assert not emulator.excess(rows)
    assert sum(r["units"] for r in loads) == 3 * 3 * 512 * 2 // 32  # x twice and w, in fp16
    assert sum(r["requests"] for r in rows if r["kind"] == "__syncthreads") == 3 * 2 * 4  # rows, barriers, warps
    assert "load<T, N>(x + i)" in loads[0]["source"]


def test_trace_sees_unaligned_rows():
    """Rows of 1031 floats start anywhere: more sectors than the bytes would need."""
    sample = next(s for s in ops.REGISTRY["rms_norm"].samples() if s.name == "wide")
    rows = emulator.trace(lambda: run("rms_norm", sample, torch.float32, "checked"))
    assert any("rms_norm.cu" in line and "global load" in line for line in emulator.excess(rows, "global"))


@pytest.mark.parametrize(
    ("op", "dtype", "loads", "stores"),
    [
        # 64 rows of 1024 columns in 16 blocks, each of two teams with 128 lanes: dy and x once; the weights once a
        # team; the rows' statistics once a warp; the sums over rows once a block, read once by the second pass.
        ("rms_norm", torch.bfloat16, 2 * 4096 + 16 * 2 * 64 + 64 * 4 + 16 * 128, 4096 + 2 * 16 * 128 + 64),
        ("rms_norm", torch.float32, 2 * 8192 + 16 * 2 * 128 + 64 * 4 + 16 * 128, 8192 + 16 * 128 + 128),
        (
            "layer_norm",
            torch.bfloat16,
            2 * 4096 + 16 * 2 * 64 + 2 * 64 * 4 + 2 * 16 * 128,
            4096 + 4 * 16 * 128 + 2 * 64,
        ),
        (
            "layer_norm",
            torch.float32,
            2 * 8192 + 16 * 2 * 128 + 2 * 64 * 4 + 2 * 16 * 128,
            8192 + 2 * 16 * 128 + 2 * 128,
        ),
    ],
)
def test_norms_keep_their_sums_over_rows_in_registers(op, dtype, loads, stores):
    """Sectors of 32 bytes that the backward pass moves. When dw was added up in memory, row by row, it took 3077 a row
    instead of 325 (rms_norm) and 5706 instead of 426 (layer_norm) in bfloat16, 2246 and 3596 instead of 518 and 588 in
    float32."""
    arguments = [torch.randn(64, 1024), *(torch.ones(1024) for _ in range(1 if op == "rms_norm" else 2))]
    arguments = [t.to(dtype).requires_grad_() for t in arguments]
    y = ops.REGISTRY[op](*arguments, backend="checked")
    dy = torch.randn(64, 1024).to(dtype)
    rows = emulator.trace(lambda: torch.autograd.grad(y, arguments, dy))
    assert sum(r["units"] for r in rows if r["kind"] == "global load") == loads
    assert sum(r["units"] for r in rows if r["kind"] == "global store") == stores


def test_trace_as_a_table(capsys):
    assert cli.main(["kernels", "trace", "rms_norm", "--sample", "odd", "--dtype", "f32"]) == 0
    text = capsys.readouterr().out
    assert "rms_norm.cu:" in text
    assert "global store" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trace", "rms_nrm"], "did you mean 'rms_norm'?"),
        (["trace", "rms_norm", "--sample", "od"], "did you mean 'odd'?"),
        (["trace", "rms_norm", "--shape", "4xa"], "expected sizes"),
        (["trace", "rms_norm", "--shape", "4"], "choose --sample"),
    ],
)
def test_bad_input_is_one_line(capsys, words, message):
    assert cli.main(["kernels", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_faults_command(capsys, monkeypatch):
    assert cli.main(["kernels", "faults", "rms_norm", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["fault"] for r in rows} == set(faults.listed("rms_norm"))
    assert all(r["reached"] and r["by"] in ("numbers", "checker") for r in rows)
    # One that no kernel has survives, and is told of.
    monkeypatch.setattr(faults, "listed", lambda op, slow=False: ["rms_norm.absent"])
    assert cli.main(["kernels", "faults", "rms_norm"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "rms_norm lists rms_norm.absent, which is not in its code" in text
    assert "0 of 1 caught" in text
