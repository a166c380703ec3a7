"""Memory: what training should need (`formulas.py`) beside what it does need (`meters.py`).

A module that trains a language model offers in its code/main.py

    def memory_plan(cfg) -> tuple[model config, memory.Setup]      # builds nothing, trains nothing

for `python -m finetune memory NAME`, and ends its run with

    config, setup = memory_plan(cfg)
    setup = replace(setup, batch=B, seq=T)                          # of the real micro-batch below
    memory.record_step(run, config, setup, model=model, optimizer=optimizer, loss=lambda: loss_of(batch))

`loss` runs one real forward of one micro-batch and returns the scalar to call backward on. `record_step` drops the
gradients, runs forward and backward twice (once to walk the saved tensors, once for the resident set), drops the
gradients again and changes nothing else: no optimizer step, so parameters and optimizer states stay as they are.

`sheet.py` lists the settings of the cheat sheet, `lab.py` measures each (`memory NAME --measure`), `simulate.py` takes
a step in shapes only, of models that do not fit and of ranks that are not there (`memory MODEL --simulate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.memory.formulas import Setup, Shape, Term, parameters, predict, shape_of
from finetune.memory.room import check_disk, check_memory

if TYPE_CHECKING:
    from finetune.memory.meters import Peak, for_training, measure, record_step, table

__all__ = [
    "Peak",
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
    """The meters need torch, the formulas do not: `python -m finetune memory llama-7b` starts without it."""
    if name in __all__:
        from finetune.memory import meters

        return getattr(meters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
