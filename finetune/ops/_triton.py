"""The torch library `finetune_triton`: the operators of `triton_kernels/<op>.py` under the schemas of the native ones.

A kernel file ends in `OPERATORS`, a dict from an operator's name to a function with the native operator's arguments
and results (`rms_norm`, `rms_norm_backward`, …), so an op file contains nothing specific to Triton. The kernels are
compiled for CUDA tensors; with TRITON_INTERPRET=1 in the environment they are interpreted on CPU tensors.

The folder `triton_kernels/` is imported as `finetune_triton_kernels`: Triton itself ships a package `triton_kernels`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import UserError
from finetune.ops._library import check_devices

if TYPE_CHECKING:
    from finetune.ops._op import Op

LIBRARY = "finetune_triton"
PACKAGE = "finetune_triton_kernels"
CHECKOUT = Path(__file__).parents[2]
loaded: dict[str, str | None] = {}  # op → None or why not
library: torch.library.Library | None = None


def kernels_folder() -> Path:
    """The folder of the kernel files: the checkout's `triton_kernels/`, or the package that a wheel installed."""
    if (CHECKOUT / "csrc" / "sources.txt").exists():  # in site-packages, triton_kernels/ next to us would be Triton's
        return CHECKOUT / "triton_kernels"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {PACKAGE} is missing from this installation: install finetune-lab again")
    return Path(spec.submodule_search_locations[0])


KERNELS = kernels_folder()


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def load(op: Op) -> str | None:
    """Defines the op's Triton operators, once; None, or why there are none."""
    if op.name not in loaded:
        loaded[op.name] = define(op)
    return loaded[op.name]


def kernels(op: str) -> Any:
    """The Python module of triton_kernels/<op>.py."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a · b + c rounds once; Triton 3.10 changes its default
    if interpreted():
        from finetune.ops import _interpreter

        _interpreter.repair()
    if PACKAGE not in sys.modules:  # by location: a checkout on PYTHONPATH wins over one that is installed
        spec = importlib.util.spec_from_file_location(PACKAGE, KERNELS / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    return importlib.import_module(f"{PACKAGE}.{op}")


def define(op: Op) -> str | None:
    global library
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not (KERNELS / f"{op.name}.py").exists():
        return f"{op.name} has no triton kernel yet"
    operators = kernels(op.name).OPERATORS
    library = library or torch.library.Library(LIBRARY, "DEF")
    for name, function in operators.items():
        schema = str(getattr(torch.ops.finetune, name).default._schema)
        library.define(schema.removeprefix("finetune::"))
        function = on_one_device(name, function, op.on_host)
        library.impl(name, *((function, "CPU") if interpreted() else (on_its_device(function), "CUDA")))
    op.register(LIBRARY)
    return None


def on_one_device(name: str, function: Callable, on_host: tuple[str, ...]) -> Callable:
    """Refuses tensors on several devices: a kernel would take an address of one for an address of another."""
    names = [argument.name for argument in getattr(torch.ops.finetune, name).default._schema.arguments]

    def call(*args: Any) -> Any:
        check_devices(name, names, args, on_host)
        return function(*args)

    return call


def on_its_device(function: Callable) -> Callable:
    """Triton launches on torch's current device: makes that the one of the first tensor given."""

    def call(*args: Any) -> Any:
        first = next(
            leaf for arg in args for leaf in (arg if isinstance(arg, list) else [arg]) if torch.is_tensor(leaf)
        )
        with torch.cuda.device_of(first):
            return function(*args)

    return call
