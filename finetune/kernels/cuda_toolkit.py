"""Where the CUDA compiler and its companions are: a toolkit, NVIDIA's wheels from PyPI (the test extra), or Triton's.

setup.py runs this file on its own, so it imports nothing of the project.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sysconfig
from pathlib import Path


def folders() -> list[Path]:
    """Where to look beyond PATH, in order."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages, local = Path(sysconfig.get_path("purelib")), Path("/usr/local")
    return [
        *(Path(home) / "bin" for home in homes),
        local / "cuda/bin",
        *(folder / "bin" for folder in sorted(local.glob("cuda-*"), reverse=True)),
        packages / "nvidia/cu13/bin",  # nvidia-cuda-nvcc
        packages / "triton/backends/nvidia/bin",  # ptxas, cuobjdump, nvdisasm
    ]


def tool(name: str) -> str | None:
    """Path of nvcc, ptxas, cuobjdump, …: from PATH, CUDA_HOME, /usr/local/cuda*, or an installed wheel."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders())))


NEEDED_DRIVER = {
    11: 450,
    12: 525,
    13: 580,
}  # the oldest driver of a CUDA runtime, by its major version (NVIDIA's table)


def driver_cuda() -> int | None:
    """The newest CUDA that the installed driver runs, 13000 for 13.0; None without a driver."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            version, library = ctypes.c_int(0), ctypes.CDLL(name)
        except OSError:
            continue
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return version.value
    return None


def driver_problem(newest: int, build_info: str) -> str | None:
    """Why a driver that runs CUDA up to `newest` cannot run the kernels of a library (its build_info()), if so: the
    CUDA runtime is linked into it, and runs on drivers of its major version and later ones."""
    found = re.search(r"nvcc=(\d+)\.(\d+)", build_info)
    if not found or newest // 1000 >= int(found[1]):
        return None
    needed = NEEDED_DRIVER.get(int(found[1]))
    which = f"driver {needed} or later" if needed else "a newer driver"
    return (
        f"the native library holds the runtime of CUDA {found[1]}.{found[2]}, which needs {which}: update the driver, "
        "or build with an older CUDA toolkit"
    )
