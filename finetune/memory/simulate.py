"""One training step of a model that does not fit, in shapes only: torch's fake tensors run the real code of the model,
the loss and the optimizer, nothing is allocated, and a tracker adds up the bytes that would be alive.

Ranks exist in name only (torch's "fake" process group): with ZeRO-3 the model is sharded by torch's fully_shard, whose
bookkeeping is then rank 0's; with ZeRO-1 and 2 the optimizer gets rank 0's slice of each parameter, and with 2 a
gradient is cut to its slice as soon as it is whole. The result is simulated, not measured: no allocator, no
library's scratch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from finetune import ops, optim
from finetune.errors import UserError
from finetune.memory import meters
from finetune.memory.setup import Setup


@contextmanager
def ranks(count: int) -> Iterator[Any]:
    """The mesh of a process group of `count` ranks of which only rank 0 exists; collectives do nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("simulating ranks needs a process without a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


def shard(model: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def own(tensor: Any, setup: Setup, stage: int) -> Any:
    """Rank 0's part of the numbers that ZeRO divides from this stage on; fully_shard has done it at stage 3."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    if setup.ranks == 1 or setup.zero < stage:
        return tensor
    return tensor.flatten()[: setup.share(tensor.numel(), stage)].clone()


def total(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages; those of fake tensors have no addresses."""
    return sum(s.nbytes() for s in {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values())


def simulate(config: dict[str, Any], setup: Setup) -> dict[str, int]:
    """Bytes of rank 0 by the names of `predict`: weights, gradients, optimizer states, activations. `config` as in
    finetune.lm.presets. UserError for LoRA and inference, which are not simulated."""
    if setup.frozen or not setup.training:
        raise UserError("simulated are training steps of all parameters: no LoRA, no inference")
    plain = Setup()
    for name in ("tp", "pp", "offload", "grad_dtype", "attention", "optimizer", "master"):
        if (value := getattr(setup, name)) != getattr(plain, name):
            option = name.replace("_", "-")
            raise UserError(f"--{option} {value} is not simulated, only AdamW of data-parallel ranks is: omit it")
    config = {**config, "max_length": max(setup.seq, config.get("max_length", 0))}
    if setup.ranks > 1 and setup.zero == 3:
        with ranks(setup.ranks) as mesh:
            return step(config, setup, mesh)
    return step(config, setup, mesh=None)


def step(config: dict[str, Any], setup: Setup, mesh: Any) -> dict[str, int]:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        model: Any = meters.build(config, setup)
        if mesh is not None:
            shard(model, mesh)
        tracker = MemTracker()
        tracker.track_external(model)

        def alive(*kinds: str) -> int:
            now = tracker.get_tracker_snapshot("current")[torch.device("cpu")]
            return sum(size for kind, size in now.items() if getattr(kind, "value", kind) in kinds)

        with tracker:
            found = {"weights": alive("Parameter")}
            tokens = torch.zeros(setup.batch, setup.seq, dtype=torch.int64)
            hidden = model(tokens, hidden=True).flatten(0, 1)
            tables = total(t for t in meters.constants(model) if not isinstance(t, nn.Parameter))
            found["activations"] = alive("Activation") - tables
            weight: Any = model.head_weight
            if hasattr(weight, "full_tensor"):
                weight = weight.full_tensor()
            gradients: dict[nn.Parameter, torch.Tensor] = {}

            def reduced(parameter: Any) -> None:
                gradients[parameter], parameter.grad = own(parameter.grad, setup, 2), None

            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(reduced)
            ops.linear_cross_entropy(hidden, weight, tokens.flatten()).backward()
            found["gradients"] = total(gradients.values())
            parts = [nn.Parameter(own(p.detach(), setup, 1)) for p in gradients]
            for part, gradient in zip(parts, gradients.values(), strict=True):
                part.grad = own(gradient, setup, 1) if gradient.shape != part.shape else gradient
            optimizer = optim.AdamW(parts, lr=1e-3)
            optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        found["optimizer states"] = total(states)
    return found


def scaled(config: dict[str, Any], setup: Setup, layers: int = 2) -> dict[str, int]:
    """`simulate` of a deep model from two shallow ones: every further layer adds the same bytes."""
    few, more = (simulate(meters.of_depth(config, n), setup) for n in (layers, layers + 1))
    return {name: few[name] + (more[name] - few[name]) * (config["layers"] - layers) for name in few}
