"""The extension with its CUDA kernels: it builds where nvcc is, imports without a GPU, and says what it lacks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune import doctor, ops
from finetune.kernels import cuda_toolkit

ROOT = Path(__file__).parents[2]
SOURCES = [line.split()[0] for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if re.match("[a-z]", line)]
KERNELS = [op for op in SOURCES if (ROOT / f"csrc/cuda/{op}.cu").exists()]
INFO = dict(word.split("=", 1) for word in torch.ops.finetune.build_info().split("|"))
built_with_nvcc = pytest.mark.skipif(INFO["nvcc"] == "0", reason="the native library was built without nvcc")
needs_nvcc = pytest.mark.skipif(not cuda_toolkit.tool("nvcc"), reason="no nvcc: pip install -e '.[test]' brings one")


def has_cuda_kernel(op: str) -> bool:
    names = [name for name in (op, f"{op}_") if ops._backends.known(f"finetune::{name}")]
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(f"finetune::{name}", "CUDA") for name in names)


@built_with_nvcc
def test_every_op_with_a_cuda_source_has_cuda_kernels():
    assert KERNELS
    assert [op for op in SOURCES if has_cuda_kernel(op)] == KERNELS
    for op in KERNELS:
        for name in (name for name in dir(torch.ops.finetune) if name in (f"{op}_backward",)):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"finetune::{name}", "CUDA"), name


@built_with_nvcc
def test_the_build_tells_its_architectures():
    assert re.fullmatch(r"\d+\.\d+\.\d+", INFO["nvcc"])
    assert re.fullmatch(r"[0-9]+[af]?(,[0-9]+[af]?)*(,[0-9]+\+ptx)?", INFO["archs"])
    row = next(row for row in doctor.native() if row["what"] == "native library")
    assert f"archs={INFO['archs']}" in row["found"]


@built_with_nvcc
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")
def test_the_library_links_as_a_cuda_torch_needs_it():
    """libtorch stays needed (it registers torch's CUDA side), the stream's symbol is weak, cudart is inside."""
    needed = subprocess.run(["readelf", "-d", ops._backends.LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in needed
    assert "libcudart" not in needed
    symbols = subprocess.run(["nm", "-D", ops._backends.LIBRARY], capture_output=True, text=True, check=True).stdout
    assert " w aoti_torch_get_current_cuda_stream" in symbols
    assert " T cuda" not in symbols, "the static runtime is hidden from others"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("op", KERNELS)
def test_a_cuda_call_without_a_gpu_is_refused_in_one_line(op):
    sample = next(s for s in ops.REGISTRY[op].samples() if not s.bench)
    with pytest.raises(ops.BackendUnavailable) as refusal:
        ops.REGISTRY[op](*sample.cast(torch.float32), backend="cuda", **sample.kwargs)
    line = str(refusal.value)
    assert "\n" not in line
    assert line.startswith(f"{op}: backend cuda cannot run this call: ")
    assert ("without its CUDA kernels" if INFO["nvcc"] == "0" else "finds no GPU") in line


def configure(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """CMake's configuration into `folder`, as setup.py asks for it."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else ["-G", "Unix Makefiles"]
    command = ["cmake", "-S", ROOT, "-B", folder, *generator, f"-DTORCH_DIR={torch.__path__[0]}"]
    command += [f"-DNVCC={cuda_toolkit.tool('nvcc') or 'NVCC-NOTFOUND'}", "-DCMAKE_BUILD_TYPE=Debug"]
    base = {name: value for name, value in os.environ.items() if not name.startswith("FINETUNE_CUDA")}
    return subprocess.run(command, env=base | environment, capture_output=True, text=True)


@needs_nvcc
def test_architectures_that_do_not_exist_are_refused(tmp_path):
    out = configure(tmp_path, FINETUNE_CUDA_ARCHS="75;hopper")
    assert out.returncode
    assert "FINETUNE_CUDA_ARCHS: '75' is no architecture from 80 on" in out.stderr


DISPATCH = """
import sys, torch
torch.ops.load_library(sys.argv[1])
print(torch.ops.finetune.build_info())
x, w = torch.randn(3, 8), torch.randn(8)
ours = torch.ops.finetune.rms_norm(x, w, 1e-5)[0]
assert torch.allclose(ours, torch.nn.functional.rms_norm(x, (8,), w, 1e-5), atol=1e-6)
"""


@pytest.mark.long
def test_without_cuda_all_else_works(tmp_path):
    """FINETUNE_CUDA=0 builds, and what it builds runs, where there is an nvcc too."""
    assert configure(tmp_path, FINETUNE_CUDA="0").returncode == 0
    subprocess.run(["cmake", "--build", tmp_path, "--parallel", "2"], check=True, capture_output=True)
    command = [sys.executable, "-c", DISPATCH, tmp_path / "_native.so"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "nvcc=0" in out


@pytest.mark.slow
@built_with_nvcc
def test_the_same_library_in_a_cuda_torch():
    """FINETUNE_CUDA_PYTHON: an interpreter with a CUDA build of torch, if not this one."""
    python = os.environ.get("FINETUNE_CUDA_PYTHON", sys.executable)
    version = subprocess.run([python, "-c", "import torch; print(torch.version.cuda)"], capture_output=True, text=True)
    if version.returncode or version.stdout.strip() == "None":
        pytest.skip(f"{python} has no CUDA build of torch; FINETUNE_CUDA_PYTHON names one that has")
    stream = "import ctypes; assert ctypes.CDLL(None).aoti_torch_get_current_cuda_stream\n"
    command = [python, "-c", DISPATCH + stream, ops._backends.LIBRARY]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


LAUNCH = """
#include <cstdio>
#include "device/launch.cuh"
__global__ void nothing() {}
int main() {
  using namespace finetune;
  std::puts(message_of(launch(nothing, dim3(1), dim3(2048), 0, nullptr)).c_str());  // too many threads for any GPU
  for (int driver : {0, 12040, 13010}) {
    failure = {"CUDA's words", driver, 13000};
    std::puts(message_of(Status::failed).c_str());
  }
}
"""


@needs_nvcc
def test_a_failed_launch_says_what_cuda_says(tmp_path):
    (tmp_path / "launch.cu").write_text(LAUNCH)
    folders = [f"-I{ROOT / folder}" for folder in ("csrc/cuda", "csrc/cuda/device", "csrc/include")]
    command = [cuda_toolkit.tool("nvcc"), "-std=c++20", *folders, tmp_path / "launch.cu", "-o", tmp_path / "launch"]
    subprocess.run(command, check=True, capture_output=True)
    real, absent, old, new = subprocess.run([tmp_path / "launch"], capture_output=True, text=True).stdout.splitlines()
    assert re.match("the kernel could not be launched: (CUDA driver version is|no CUDA-capable|invalid )", real)
    wanted = "the library holds the runtime of CUDA 13.0, which needs driver 580 or later: update the driver, or build"
    assert f"CUDA's words; the driver is absent, {wanted}" in absent
    assert f"CUDA's words; the driver runs CUDA up to 12.4, {wanted}" in old
    assert new == "the kernel could not be launched: CUDA's words"


def test_doctor_names_a_driver_that_is_too_old(monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "driver_cuda", lambda: 12040)
    monkeypatch.setattr(torch.ops.finetune, "build_info", lambda: "compiler=GNU|nvcc=13.0.88|archs=80", raising=False)
    (row,) = doctor.driver()
    assert not row["ok"]
    assert (
        "runs CUDA up to 12.4; the native library holds the runtime of CUDA 13.0, which needs driver 580"
        in row["found"]
    )
    monkeypatch.setattr(cuda_toolkit, "driver_cuda", lambda: 13000)
    (row,) = doctor.driver()
    assert row["ok"]
    monkeypatch.setattr(cuda_toolkit, "driver_cuda", lambda: None)
    assert [row["ok"] for row in doctor.driver()] == [None]
