"""Every formula of the cheat sheet, measured: models of the same shape are built with random weights, one setting after
the other, and their tensors counted. ZeRO is simulated (`simulate.py`): its other ranks are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune import ops, optim
from finetune.alignment import logprobs
from finetune.lm import head
from finetune.lm.cache import KVCache
from finetune.memory import meters, simulate
from finetune.memory.formulas import predict
from finetune.memory.setup import Setup, Shape, Term, shape_of
from finetune.memory.sheet import entries_for
from finetune.ops.kv_cache import pool
from finetune.runs import machine

ROOM = 0.7  # the share of the free memory that a measurement may be predicted to take


def measure(config: Any, setup: Setup, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Rows of {name: "setting: term", predicted, measured, simulated}: the setup as it is, then the sheet's settings.
    `measured` is None where a setting does not fit into this machine or has no meter. It calls progress(done, of)."""
    config, rows = fitting(config, setup), []
    shape = shape_of(config)
    own = {term.name: term for term in predict(shape, setup) if term.name != "peak" and term.bytes}
    settings = [("as it is", setup, own)]
    settings += [(e.name[0], e.setup(setup), e.predicted(shape, setup)) for e in entries_for(shape)]
    for done, (name, each, terms) in enumerate(settings):
        progress(done, len(settings))
        found = measured(config, each, terms)
        rows += [
            {"name": f"{name}: {term}", "predicted": terms[term].bytes, "measured": size, "simulated": each.ranks > 1}
            for term, size in found.items()
        ]
    progress(len(settings), len(settings))
    return rows


def measured(config: Any, setup: Setup, terms: dict[str, Term]) -> dict[str, int | None]:
    """Bytes by the names of `terms`; see `measure`."""
    if setup.ranks > 1:
        found = simulate.scaled(config if isinstance(config, dict) else asdict(config), setup)
        return {name: found.get(name) for name in terms}
    shape, room = shape_of(config), ROOM * (machine.available_memory_bytes() or machine.total_memory_bytes())
    kept = sum(
        term.bytes for term in predict(shape, setup) if term.name in ("weights", "gradients", "optimizer states")
    )
    rig = Rig(config, shape, setup)
    return {
        name: METERS[name](rig) if name in METERS and kept + term.bytes <= room else None
        for name, term in terms.items()
    }


def fitting(config: Any, setup: Setup) -> Any:
    """The config with room for the setup's tokens."""
    longest = max(setup.seq, shape_of(config).max_length)
    return {**config, "max_length": longest} if isinstance(config, dict) else replace(config, max_length=longest)


class Rig:
    """A model of one setup with its optimizer, made when they are asked for."""

    def __init__(self, config: Any, shape: Shape, setup: Setup) -> None:
        self.config, self.shape, self.setup = config, shape, setup
        self.made: Any = None

    @property
    def model(self) -> Any:
        if self.made is None:
            torch.manual_seed(0)
            self.made = meters.build(self.config, self.setup)
        return self.made

    def tokens(self, batch: int, seq: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.shape.vocab, (batch, seq), generator=generator)

    def loss(self, tokens: Tensor) -> Tensor:
        if virtual := getattr(self.model, "virtual", None):
            tokens = tokens[:, self.setup.prompt :]  # a prompt is counted in
            hidden = virtual(self.model, tokens, hidden=True).flatten(0, 1)
        else:
            hidden = self.model(tokens, hidden=True).flatten(0, 1)
        targets = tokens.flatten()
        if self.setup.loss == "full":
            return F.cross_entropy(F.linear(hidden, self.model.head_weight).float(), targets)
        if self.setup.loss == "logprobs":
            return -logprobs.of_states(self.model, hidden, targets)[0].mean()
        return head.cross_entropy(self.model, hidden, targets)

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Inside, the models' attention is the setup's: naive is the reference, selective computes it again."""
        own = ops.attention
        naive: Any = partial(own, backend="reference")
        if self.setup.checkpointing == "selective":
            ops.attention = partial(checkpoint, naive, use_reentrant=False)  # type: ignore[assignment]
        elif self.setup.attention == "naive":
            ops.attention = naive
        try:
            yield
        finally:
            ops.attention = own

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def gradients(rig: Rig) -> int:
    """Of few tokens: their number does not change a gradient's size."""
    rig.loss(rig.tokens(1, 8)).backward()
    found = meters.gradient_bytes(rig.model)
    rig.model.zero_grad(set_to_none=True)
    return found


def states_of(model: nn.Module, setup: Setup, trained: list[nn.Parameter]) -> int | None:
    """Bytes of the optimizer's states after a step on gradients of zeros; None where nothing here keeps such states."""
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    found = sum(map(meters.optimizer_bytes, made)) if (made := optimizers(model, setup, trained)) is not None else None
    model.zero_grad(set_to_none=True)
    return found


def optimizers(model: nn.Module, setup: Setup, trained: list[nn.Parameter]) -> list[torch.optim.Optimizer] | None:
    """Optimizers of this project, or else torch's, that have made a step; None where neither keeps such states,
    as with masters next to torch's."""
    kind, narrow = setup.optimizer, any(p.element_size() < 4 for p in trained)
    ours = {"adamw": "fp32", "adamw8bit": "8bit"}
    made: list[torch.optim.Optimizer]
    if kind in ours:
        made = [optim.AdamW(trained, lr=0.0, moments=ours[kind], master="auto" if setup.master else False)]  # type: ignore[arg-type]
    elif narrow and setup.master:
        return None
    elif kind == "muon":
        blocks = {id(p) for name, p in model.named_parameters() if name.startswith("blocks.")}
        matrices = {id(p) for p in trained if p.dim() == 2 and id(p) in blocks}
        made = [torch.optim.Muon([p for p in trained if id(p) in matrices], lr=0.0)]
        if rest := [p for p in trained if id(p) not in matrices]:
            made.append(torch.optim.AdamW(rest, lr=0.0))
    else:
        torchs: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adamw_bf16": torch.optim.AdamW,
            "sgd": torch.optim.SGD,
            "sgd_momentum": partial(torch.optim.SGD, momentum=0.9),
            "adafactor": torch.optim.Adafactor,
        }
        if kind == "adamw_bf16" and not narrow:
            return None
        made = [torchs[kind](trained, lr=0.0)]
    for each in made:
        each.step()
    return made


def activations(rig: Rig) -> int:
    with rig.attention():
        return meters.saved_bytes(rig.model, lambda: rig.loss(rig.tokens(rig.setup.batch, rig.setup.seq)))


def one_block(rig: Rig) -> int:
    """Bytes that a third block adds to two."""
    two, three = (activations(Rig(meters.of_depth(rig.config, n), rig.shape, rig.setup)) for n in (2, 3))
    return three - two


def logits(rig: Rig) -> int:
    setup, weight = rig.setup, rig.model.head_weight
    if not setup.training:
        state = torch.zeros(setup.batch, rig.shape.dim, dtype=weight.dtype)
        with torch.no_grad():
            return F.linear(state, weight).float().nbytes
    if setup.loss != "full":
        return meters.loss_bytes(rig.model, rig.shape, setup)
    scores = torch.zeros(setup.tokens, rig.shape.vocab, requires_grad=True)
    targets = torch.zeros(setup.tokens, dtype=torch.int64)
    return meters.peak_allocated(lambda: F.cross_entropy(scores, targets).backward())


def kv_cache(rig: Rig) -> int:
    """The cache of lm/cache.py, or a layer's pools times the layers."""
    setup, shape = rig.setup, rig.shape
    if setup.kv_dtype == "same" and setup.kv_block == 1:
        return KVCache(rig.model, setup.batch, setup.seq).nbytes
    dtypes = {"same": meters.TORCH_DTYPES[setup.dtype], "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    blocks = setup.batch * -(-setup.seq // setup.kv_block)
    layer = [pool(blocks, setup.kv_block, shape.kv_heads, shape.head_dim, dtypes[setup.kv_dtype]) for _ in "kv"]
    return shape.layers * meters.storage_bytes(meters.tensors_in(layer))


def plain(setup: Setup) -> Setup:
    """The setup without adapters and virtual tokens."""
    return replace(setup, lora_rank=0, whole="", untied=False, prompt=0, prefix=0, quantized="none")


def scalar_model(rig: Rig) -> Any:
    """A reward or value model: the policy's shape with a head of one number."""
    model = meters.build(rig.config, plain(rig.setup))
    if not rig.shape.tied:
        del model.head
    model.scalar = nn.Linear(rig.shape.dim, 1, bias=False, dtype=meters.TORCH_DTYPES[rig.setup.dtype])
    return model


def value_model(rig: Rig) -> int | None:
    model = scalar_model(rig)
    model.scalar(model(rig.tokens(1, 8), hidden=True)).sum().backward()
    kept = meters.weight_bytes(model) + meters.gradient_bytes(model)
    states = states_of(model, rig.setup, [p for p in model.parameters() if p.grad is not None])
    return None if states is None else kept + states


def step_growth(rig: Rig) -> int:
    tokens = rig.tokens(rig.setup.batch, rig.setup.seq)
    with rig.attention():
        rig.loss(tokens).backward()  # memory that is touched only once
        rig.model.zero_grad(set_to_none=True)
        with meters.Peak() as peak:
            rig.loss(tokens).backward()
    rig.model.zero_grad(set_to_none=True)
    return peak.growth


METERS: dict[str, Callable[[Rig], int | None]] = {
    "weights": lambda rig: meters.weight_bytes(rig.model),
    "gradients": gradients,
    "optimizer states": lambda rig: states_of(rig.model, rig.setup, rig.trained()),
    "activations of a block": one_block,
    "activations": activations,
    "logits": logits,
    "KV cache": kv_cache,
    "reference model": lambda rig: meters.weight_bytes(meters.build(rig.config, plain(rig.setup))),
    "reward model": lambda rig: meters.weight_bytes(scalar_model(rig)),
    "value model": value_model,
    "step growth": step_growth,
}
