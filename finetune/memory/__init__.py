"""Memory of training: predicted from shapes (`formulas.py`) and measured on live tensors (`meters.py`).

A module that trains a language model offers in its code/main.py

    def memory_plan(cfg) -> tuple[model config, memory.Setup]      # builds nothing, trains nothing

for `python -m finetune memory NAME` (one with another network a memory.Plan: its own terms and how to measure them),
and ends its run with

    config, setup = memory_plan(cfg)
    setup = replace(setup, batch=B, seq=T)                          # of the real micro-batch below
    memory.record_step(run, config, setup, model=model, optimizer=optimizer, loss=lambda: loss_of(batch))

`loss` runs one real forward of one micro-batch and returns the scalar to call backward on. `record_step` drops the
gradients, runs forward and backward twice (once to walk the saved tensors, once for the resident set), drops the
gradients again and changes nothing else: no optimizer step, so parameters and optimizer states stay as they are.

`sheet.py` lists the settings of the cheat sheet, `lab.py` measures each (`memory NAME --measure`), `simulate.py` takes
a step in shapes only, of models that do not fit and of ranks that do not exist (`memory MODEL --simulate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.memory.counts import parameters
from finetune.memory.formulas import predict
from finetune.memory.plan import Plan
from finetune.memory.room import check_disk, check_memory
from finetune.memory.setup import Setup, Shape, Term, shape_of

if TYPE_CHECKING:
    from finetune.memory.meters import Peak, for_training, measure, record_step, table

__all__ = [
    "Peak",
    "Plan",
    "Setup",
    "Shape",
    "Term",
    "check_disk",
    "check_memory",
    "for_training",
    "measure",
    "predict",
    "record_step",
    "shape_of",
]
__all__ += ["parameters", "table"]


def __getattr__(name: str) -> Any:
    """The meters import torch; the command line's tables of names do not need it."""
    if name in __all__:
        from finetune.memory import meters

        return getattr(meters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
