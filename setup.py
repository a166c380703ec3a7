"""Builds finetune/_native.so with CMake and installs triton_kernels/ as `finetune_triton_kernels` (Triton has a package
of the folder's name); everything else about the package is in pyproject.toml."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find(*names: str) -> str | None:
    """The first of these programs on PATH or next to this Python (where pip puts cmake and ninja)."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    return next((found for name in names if name and (found := shutil.which(name, path=path))), None)


def stop(line: str) -> None:
    """Ends the build with one line instead of a traceback."""
    sys.exit(f"finetune: {line}")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if not find(os.environ.get("CXX", ""), "c++", "g++", "clang++"):
            stop(
                "no C++ compiler found; install one (Debian, Ubuntu: apt install g++ | Fedora: dnf install gcc-c++ | "
                "macOS: xcode-select --install) or point CXX to it"
            )
        cmake, ninja = find("cmake"), find("ninja")
        if not cmake:
            stop("cmake not found; pip install cmake ninja")
        if not ninja and not find("make"):
            stop("neither ninja nor make found; pip install ninja")
        try:
            import torch
        except ImportError:
            stop("torch not found; pip install torch==2.13.0, or install without --no-build-isolation")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
        build = ROOT / "build" / ("ninja" if ninja else "make")
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        nvcc = runpy.run_path(str(ROOT / "finetune/kernels/cuda_toolkit.py"))["tool"]("nvcc")
        configure = [cmake, "-S", ROOT, "-B", build, *generator, f"-DTORCH_DIR={torch.__path__[0]}"]
        configure += [f"-DNVCC={nvcc or 'NVCC-NOTFOUND'}"]
        with_cuda = nvcc and os.environ.get("FINETUNE_CUDA", "1") != "0"
        hint = "; FINETUNE_CUDA=0 builds without the CUDA kernels" if with_cuda else ""
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (
            [*configure, f"-DCMAKE_INSTALL_PREFIX={target}"],
            [cmake, "--build", build, "--parallel", jobs],
            [cmake, "--install", build],
        ):
            if subprocess.run([str(word) for word in command]).returncode:
                stop(
                    f"the native build failed at: {' '.join(str(word) for word in command)} (its output is above){hint}"
                )

    def get_ext_filename(self, name: str) -> str:
        """finetune/_native.so: no Python ABI in the name, since torch loads it, not Python's import."""
        return str(Path(*name.split("."))) + ".so"


setup(
    packages=[*find_packages(include=["finetune", "finetune.*"]), "finetune_triton_kernels"],
    package_dir={"finetune_triton_kernels": "triton_kernels"},
    ext_modules=[Extension("finetune._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
