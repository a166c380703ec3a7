"""Shared by all tests: markers skip what this machine lacks, with the reason."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

# Before anything imports triton, which reads it once: without a GPU its kernels are interpreted. Processes that tests
# start inherit it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    peers = all(importlib.util.find_spec(name) for name in ("transformers", "peft", "trl"))
    for item in items:
        rehearsed = os.environ.get("FINETUNE_GPU_CHECK") == "emulated"  # scripts/gpu_check without a GPU
        if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not rehearsed:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("peer") and not peers:
            item.add_marker(pytest.mark.skip(reason="needs the peers extra: pip install -e '.[peers]'"))


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing: their picture files are empty, and there are no training curves."""
    from matplotlib.figure import Figure

    from finetune.runs.run import Run

    monkeypatch.setattr(Run, "curves", lambda self: None)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b""))


@pytest.fixture(scope="session")
def smollm2():
    """Folder of SmolLM2-135M-Instruct, fetched into the user's cache the first time."""
    from finetune.lm.io import smollm2

    return smollm2.fetch()


@pytest.fixture(scope="session")
def smollm2_model(smollm2):
    """Our Llama with its weights in fp32; shared, so tests must leave it as it is."""
    from finetune.lm.io import load

    return load.llama(smollm2)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2):
    from finetune.lm.io import load

    return load.tokenizer(smollm2)


@pytest.fixture(scope="session")
def smollm2_peer(smollm2):
    """transformers' Llama of the same folder, fp32 (peer tests only); shared too."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


LEVELS = ("portable", "avx2", "avx512")


@pytest.fixture(params=["reference", *LEVELS, "emulated", "triton"])
def backend(request):
    """Every backend of an op that runs on CPU tensors; the levels of the CPU one by one."""
    from finetune.environment import CPU_LEVELS
    from finetune.kernels import emulator

    before = torch.ops.finetune.cpu_level()
    if request.param == "emulated":
        emulator.load("emulated")
    elif request.param in LEVELS:
        if CPU_LEVELS.index(request.param) > CPU_LEVELS.index(torch.ops.finetune.cpu_level_supported()):
            pytest.skip(f"this machine has no {request.param}")
        torch.ops.finetune.set_cpu_level(request.param)
    elif request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton compiles for the GPU here")
    yield "cpp" if request.param in LEVELS else request.param
    torch.ops.finetune.set_cpu_level(before)
