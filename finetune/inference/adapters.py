"""LoRA adapters chosen per request over one base (Punica: Chen et al. 2023, arXiv:2310.18547; S-LoRA: Sheng et al.
2023, arXiv:2311.03285).

    y = base(x) for all tokens of a step;   y[n] += s_a B_a (A_a x[n]) for every token n whose request has adapter a

A layer runs its base product once, whatever the tokens' adapters, and two thin products for each adapter in the step,
over its own tokens only. The factors of all adapters are stored one below the other, (Σ ranks, in) and (Σ ranks, out):
ranks may differ, and nothing is padded. The base may be quantized, for only its result is added to.

The addition is a forward hook of the layer, in place for one forward pass: the model itself stays the base.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune import ops
from finetune.errors import UserError, nearest
from finetune.inference.scheduler import Work
from finetune.inference.virtual_tokens import Virtual
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama
from finetune.ops.quantized_linear import QuantizedWeight, dense
from finetune.peft.adapters import CONFIG, Held, kind, load_prompt, read_lora
from finetune.peft.lora import LoRALinear
from finetune.peft.whole import has_post_norms

HEAD = "head"
# Tensors that an adapter folder may hold and that are no low-rank sum, as an error calls them.
CALLED = {"lora_embedding_A": "LoRA of an embedding", "lora_embedding_B": "LoRA of an embedding",
          "token_adapter.trainable_tokens_delta": "trained tokens"}  # fmt: skip
Rows = Sequence[tuple[str, slice]]  # of a step: the name of an adapter, and tokens next to each other that are its own


@dataclass
class Stack:
    """The factors of all adapters of one layer: `down` (Σ ranks, in) and `up` (Σ ranks, out) in fp32; of each
    adapter by name s, and its part of the two; in a batch-invariant engine also A and s B packed (invariance.py)."""

    down: Tensor
    up: Tensor
    scale: dict[str, float] = field(default_factory=dict)
    views: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # Aᵀ (in, r) and Bᵀ (r, out)
    packed: dict[str, tuple[QuantizedWeight, QuantizedWeight]] = field(default_factory=dict)

    def take(self, name: str, start: int, rank: int, scale: float, pack: bool) -> None:
        """Names the adapter whose ranks begin at `start`."""
        ranks = slice(start, start + rank)
        self.scale[name], self.views[name] = scale, (self.down[ranks].T, self.up[ranks])
        if pack:
            a, b = self.down[ranks], self.up[ranks].T.contiguous() * scale
            self.packed[name] = dense(a).packed(a.device), dense(b).packed(b.device)

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """y (N, out) plus the adapters' sums of x (N, in), in fp32 before the result is rounded; y is overwritten."""
        wide, total = x.to(self.down.dtype), y.to(self.down.dtype)
        for name, own in rows:
            if name in self.packed:
                a, b = self.packed[name]
                total[own] += ops.quantized_linear(ops.quantized_linear(wide[own], a), b)
            elif name in self.views:
                down, up = self.views[name]
                total[own].addmm_(wide[own] @ down, up, alpha=self.scale[name])
        return total.to(y.dtype)


class Adapters:
    """The adapters in these folders, by name, for requests to `model`. UserError for a folder that is damaged, of
    another model, or holds more than low-rank sums of linear layers: DoRA, PiSSA as peft writes it, whole modules."""

    def __init__(self, model: Llama | GPT, folders: Mapping[str, str | Path], invariant: bool = False) -> None:
        for at, module in model.named_modules():
            if folders and isinstance(module, LoRALinear):
                raise UserError(f"{at} of the model has an adapter on it already: serve the base, and adapters over it")
        self.model, self.stacks, self.digests = model, dict[str, Stack](), dict[str, bytes]()
        found: dict[str, list[tuple[str, float, Tensor, Tensor]]] = {}
        self.virtual = dict[str, Virtual]()  # of folders that hold a trained prompt or prefix instead
        for name, folder in folders.items():
            if kind(folder) != "LORA":
                self.virtual[name] = Virtual(model, load_prompt(cast(Llama, model), folder))
                continue
            digest = hashlib.sha256()
            for at, scale, a, b in factors(model, Path(folder)):
                found.setdefault(at, []).append((name, scale, a, b))
                digest.update(f"{at} {scale!r} {tuple(a.shape)} {tuple(b.shape)} ".encode())
                digest.update(a.contiguous().numpy().tobytes())
                digest.update(b.contiguous().numpy().tobytes())
            self.digests[name] = digest.digest()
        device = model.norm.weight.device
        for at, parts in found.items():
            down, up = torch.cat([a for *_, a, _ in parts]), torch.cat([b.T for *_, b in parts])
            self.stacks[at] = stack = Stack(down.to(device), up.contiguous().to(device))
            start = 0
            for name, scale, a, _ in parts:
                stack.take(name, start, len(a), scale, invariant)
                start += len(a)

    @property
    def nbytes(self) -> int:
        return sum(stack.down.nbytes + stack.up.nbytes for stack in self.stacks.values())

    def digest(self, name: str | None) -> bytes:
        """SHA-256 of the adapter's tensors and scales, whatever its name; empty for None, the base. UserError for an
        unknown name."""
        if name is not None and name not in self.digests:
            raise UserError(f"there is no adapter '{name}'{nearest(name, [*self.digests, *self.virtual])}")
        return b"" if name is None else self.digests[name]

    def rows(self, plan: Sequence[Work], counts: Sequence[int] | None = None) -> list[tuple[str, slice]]:
        """Which rows are whose adapter's, where each work has `counts` of them, in the plan's order: by default all its
        tokens. Neighbors with the same adapter are taken together."""
        found, start = [], 0
        each = zip((work.sequence.adapter for work in plan), counts or [work.count for work in plan], strict=True)
        for name, group in groupby(each, key=lambda pair: pair[0]):
            count = sum(count for _, count in group)
            if count and name is not None:
                found.append((name, slice(start, start + count)))
            start += count
        return found

    @contextmanager
    def on(self, rows: Rows) -> Iterator[None]:
        """Context of one forward pass (1, N) whose layers add the adapters of `rows`."""
        hooks = [
            self.model.get_submodule(at).register_forward_hook(partial(added, stack, rows))
            for at, stack in self.stacks.items()
            if at != HEAD and any(name in stack.scale for name, _ in rows)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def on_head(self, hidden: Tensor, plan: Sequence[Work], counts: Sequence[int]) -> Tensor | None:
        """What the adapters add to the logits of hidden (n, C), of which each work has `counts` rows: (n, V) in fp32;
        None: nothing."""
        stack = self.stacks.get(HEAD)
        rows = self.rows(plan, counts)
        if stack is None or not any(name in stack.scale for name, _ in rows):
            return None
        return stack.add(hidden.new_zeros(len(hidden), stack.up.shape[1], dtype=stack.up.dtype), hidden, rows)


def added(stack: Stack, rows: Rows, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook of a layer."""
    return stack.add(output[0], inputs[0][0], rows)[None]


def factors(model: Llama | GPT, folder: Path) -> Iterator[tuple[str, float, Tensor, Tensor]]:
    """(layer, s, A (r, in), B (out, r)) of each layer that the folder's adapter changes by s B A, in fp32."""
    held = read_lora(folder, has_post_norms(model))
    refuse_others(model, folder, held)
    for at, rank in held.ranks.items():
        a, b = held.tensors[at, "lora_A"], held.tensors.get((at, "lora_B"))
        shape = layer_shape(model, at)
        if shape is None:
            raise UserError(f"{folder}: the adapter is for a layer {at}, which this model does not have")
        if b is None or (b.dim(), a.shape[1], *b.shape) != (2, shape[1], shape[0], rank):
            got = "missing" if b is None else f"{tuple(b.shape)}, lora_A {tuple(a.shape)}"
            raise UserError(f"{folder}: lora_B of {at} is {got}, the layer is {shape}: is it an adapter of this model?")
        yield at, held.alphas[at] / (math.sqrt(rank) if held.config.use_rslora else rank), a.float(), b.float()


def layer_shape(model: Any, at: str) -> tuple[int, int] | None:
    """(out, in) of a linear layer; None if the model has none of that name."""
    if at == HEAD:
        return model.config.vocab_size, model.config.dim
    try:
        layer = model.get_submodule(at)
    except AttributeError:
        return None
    return (layer.out_features, layer.in_features) if hasattr(layer, "in_features") else None


def refuse_others(model: nn.Module, folder: Path, held: Held) -> None:
    """UserError for what is not a low-rank sum."""
    variant = "DoRA (use_dora)" if held.config.use_dora else "PiSSA (init_lora_weights)" if held.pissa else ""
    for at, parts in held.others.items():
        for part, tensor in parts.items():
            if part in CALLED:
                variant = f"{CALLED[part]} ({at})"
            elif not is_bases(model, at, part.rpartition(".")[2], tensor):
                variant = f"{at} with a {part.rpartition('.')[2]} of its own"
    if variant:
        raise UserError(
            f"{folder / CONFIG}: {variant} is not a low-rank sum, which is all that is added per request: merge the "
            "adapter (`finetune merge`) and serve the result"
        )


def is_bases(model: Any, at: str, key: str, tensor: Tensor) -> bool:
    """Whether the tensor is the base's own: peft stores the embedding with an adapter of the head."""
    try:
        mine = model.head_weight if (at, key) == (HEAD, "weight") else getattr(model.get_submodule(at), key, None)
    except AttributeError:
        return False
    return isinstance(mine, Tensor) and mine.shape == tensor.shape and torch.equal(tensor.to(mine), mine)
