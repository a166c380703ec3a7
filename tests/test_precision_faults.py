"""Every deliberate fault of the optimizer's and the mixed-precision kernels must make some sample's result wrong."""

import re

import pytest
import torch

from finetune import emulator, ops
from finetune.ops._check import WrongResult, check

OPS = ("adamw",)


def faults(op: str) -> list[str]:
    text = (emulator.ROOT / f"csrc/cuda/{op}.cu").read_text()
    listed = re.search(r"Faults:((?:\s|//|[a-z0-9_]+\.[a-z0-9_]+)+)", text)
    assert listed, op
    names = re.findall(r"[a-z0-9_]+\.[a-z0-9_]+", listed[1])
    assert set(re.findall(rf'BUG\("({op}\.[a-z0-9_]+)"\)', text)) <= set(names), "a fault is not in the list"
    assert len(names) >= (6 if "SHARED(" in text else 3)
    return names


@pytest.mark.parametrize(("op", "fault"), [(op, fault) for op in OPS for fault in faults(op)])
def test_faults_are_rejected(op, fault):
    emulated = emulator.load("emulated")
    emulated.set_bug(fault)
    try:
        for sample in ops.REGISTRY[op].samples():
            if not sample.bench:
                for dtype in (torch.float32, torch.bfloat16):
                    try:
                        check(op, sample, dtype, "emulated")
                    except (WrongResult, RuntimeError):
                        return
        pytest.fail(f"no sample notices {fault}")
    finally:
        emulated.set_bug("")
