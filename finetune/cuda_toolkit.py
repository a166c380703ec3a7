"""Where the CUDA compiler and its companions are: a toolkit, NVIDIA's wheels from PyPI (the test extra), or Triton's.

setup.py runs this file by itself, so it imports nothing of the project.
"""

from __future__ import annotations

import os
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
