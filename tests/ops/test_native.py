"""The native build outside torch: the C++ tests at every level, and that ARM compiles."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "csrc/cpu").glob("*.cpp"))


@pytest.mark.slow
def test_cpp_tests(tmp_path):
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, *generator, "-DFINETUNE_TESTS=ON"], check=True, capture_output=True
    )
    subprocess.run(["cmake", "--build", tmp_path, "--target", "cpp_tests"], check=True, capture_output=True)
    out = subprocess.run(["ctest", "--test-dir", tmp_path, "--output-on-failure"], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout
    assert "100% tests passed" in out.stdout


def test_without_a_compiler_the_build_fails_with_one_line(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "temp",
    ]
    out = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert out.returncode == 1
    assert out.stderr.splitlines()[-1].startswith("finetune: no C++ compiler found; install one (Debian, Ubuntu:")
    assert "Traceback" not in out.stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_arm_compiles(source, tmp_path):
    """zig's clang carries the ARM headers, so that every machine can check this."""
    command = [
        sys.executable,
        "-m",
        "ziglang",
        "c++",
        "-target",
        "aarch64-linux-gnu",
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
    ]
    defines = ["-DFINETUNE_LEVEL=portable", "-DFINETUNE_LANES=16", f"-I{ROOT}/csrc/include"]
    out = subprocess.run(
        [*command, "-Werror", *defines, "-c", source, "-o", tmp_path / "out.o"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
