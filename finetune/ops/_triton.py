"""The torch library `finetune_triton`: the operators of `triton_kernels/<op>.py` under the schemas of the native ones.

A kernel file ends in `OPERATORS`, a dict from an operator's name to a function with the native operator's arguments
and results (`rms_norm`, `rms_norm_backward`, …), so the op's page needs nothing of its own for Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from finetune.ops._op import Op

LIBRARY = "finetune_triton"
loaded: dict[str, str | None] = {}  # op → None or why not
library: torch.library.Library | None = None


def load(op: Op) -> str | None:
    """Defines the op's Triton operators, once; None, or why there are none."""
    if op.name not in loaded:
        loaded[op.name] = define(op)
    return loaded[op.name]


def define(op: Op) -> str | None:
    global library
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not (Path(__file__).parents[2] / "triton_kernels" / f"{op.name}.py").exists():
        return f"{op.name} has no triton kernel yet"
    kernels = importlib.import_module(f"triton_kernels.{op.name}")
    library = library or torch.library.Library(LIBRARY, "DEF")
    for name, function in kernels.OPERATORS.items():
        schema = str(getattr(torch.ops.finetune, name).default._schema)
        library.define(schema.removeprefix("finetune::"))
        library.impl(name, function, "CompositeExplicitAutograd")
    op.native.register(LIBRARY)
    return None
