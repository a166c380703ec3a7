"""Where the Triton kernels are imported from: the checkout's triton_kernels/ or a wheel's package, and never the
distribution `triton_kernels` of Triton itself, which has a swiglu.py too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
INTERPRETED_KERNEL = """
import torch
from finetune import ops
from finetune.ops import _triton
x = torch.linspace(-2, 2, 35).view(5, 7)
y = ops.swiglu(x, x, backend="triton")
assert (y - ops.swiglu(x, x, backend="reference")).abs().max() < 1e-6
print(_triton.kernels("swiglu").__file__)
"""


def python(folder, *arguments):
    """Runs Python in `folder`, with a stand-in for Triton's distribution there and first on the path."""
    stand_in = folder / "path" / "triton_kernels"
    stand_in.mkdir(parents=True, exist_ok=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "swiglu.py").write_text("def swiglu(a, alpha): ...\n")
    path = os.pathsep.join([str(folder / "path"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_checkout_uses_its_own_kernels_next_to_tritons_package(tmp_path):
    assert "swiglu" in python(tmp_path, "-m", "finetune", "ops")
    found = Path(python(tmp_path, "-c", INTERPRETED_KERNEL).strip())
    assert found == ROOT / "triton_kernels" / "swiglu.py"


def test_an_installation_uses_the_package_of_the_wheel(tmp_path):
    """The files that a wheel would install, in site-packages together with Triton's package."""
    build = ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "path"]
    subprocess.run([sys.executable, "setup.py", "-q", *map(str, build)], cwd=ROOT, check=True, capture_output=True)
    assert {p.name for p in (tmp_path / "path").iterdir()} == {"finetune", "finetune_triton_kernels"}
    found = Path(python(tmp_path, "-c", INTERPRETED_KERNEL).strip())
    assert found == tmp_path / "path" / "finetune_triton_kernels" / "swiglu.py"
