"""The part of a model that one rank holds under tensor and pipeline parallelism, as a shape: the formulas of a whole
model hold for it.

Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053, §3) divides heads, MLP columns and the vocabulary by t;
norms, biases of row-parallel layers and learned positions are on every rank. A pipeline divides the layers by p; its
first stage has the embedding and, with one forward and one backward in turn (1F1B; Narayanan et al. 2021,
arXiv:2104.04473, §2.2), p micro-batches in flight; its last has the last norm, the projection and the loss, and one.
"""

from __future__ import annotations

from dataclasses import replace

from finetune.memory.setup import Setup, Shape


def parts(shape: Shape, setup: Setup) -> list[Shape]:
    """What the first and the last stage of the pipeline hold, or the one part that there is. Stages between them hold
    less than the first. Odd vocabularies and numbers of layers are rounded up."""
    local, stages = shape, setup.pp
    if (t := setup.tp) > 1:
        local = replace(
            shape,
            vocab=-(-shape.vocab // t),
            heads=shape.heads // t,
            kv_heads=shape.kv_heads // t,
            hidden=shape.hidden // t,
        )
    if stages == 1:
        return [local]
    flying = stages if setup.training else 1
    first = replace(local, layers=-(-shape.layers // stages), last=False, in_flight=flying)
    return [first, replace(local, layers=shape.layers // stages, first=False)]
