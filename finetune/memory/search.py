"""The settings with which a model fits into a given memory, fastest first (`memory NAME --for "24 GiB"`).

Nothing is timed. `cost` adds up the FLOPs of a token and the bytes that are moved for it, a byte as expensive as the
FLOPs that a card does meanwhile; it ranks settings of one model and says nothing about seconds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from finetune.errors import UserError
from finetune.memory.counts import block_adapters, linear_weights, trained
from finetune.memory.models import Model
from finetune.memory.possible import check_shape
from finetune.memory.room import size
from finetune.memory.setup import Setup, Shape
from finetune.memory.states import kv_cache, optimizer_states, weights

# NVIDIA's data sheet of the A100 80 GB: 312 TFLOP/s in 16 bits, 156 in TF32, 2,039 GB/s.
FLOPS_A_BYTE = 312e12 / 2039e9
FP32_FACTOR = 2
RANK = 8
BATCHES = [1 << power for power in range(11)]
OPTIMIZERS = ("adamw", "adamw8bit", "adamw_bf16", "adafactor")  # SGD and Muon learn otherwise, and want other settings
MARGIN = 0.95  # of the memory: tests allow the formulas 5 % of what is measured
SAME = 1.02  # costs that differ by less count as equal: then the setting that is listed first


@dataclass(frozen=True)
class Found:
    setup: Setup
    peak: int
    cost: float  # FLOPs of a token, and bytes in FLOPs
    command: str


def cost(shape: Shape, setup: Setup) -> float:
    """FLOPs a token in 16 bits, each byte moved as FLOPS_A_BYTE.

    Training: a forward pass is 2 FLOPs a weight and 4·H·D for each key that a query sees (half of the row, or the
    window); a backward pass twice that, over frozen weights once; checkpointing one more forward pass. A pass reads
    the weights once a micro-batch; quantized ones are written and read in 16 bits too. The optimizer's step reads and
    writes what is trained, its gradient and its states. So a larger micro-batch costs less a token. Inference: a
    decoded token reads its row's cache, and the weights once a batch.
    """
    used = shape.layers * linear_weights(shape) + shape.vocab * shape.dim
    local = shape.window_layers if shape.window else 0
    seen = setup.document / 2 if setup.training else setup.seq
    keys = (shape.layers - local) * seen + local * min(seen, shape.window)
    attention = 4 * shape.heads * shape.head_dim * keys
    stored = weights(shape, setup).bytes
    if setup.quantized != "none":
        stored += 2 * setup.element * shape.layers * linear_weights(shape)
    factor = FP32_FACTOR if setup.dtype == "fp32" else 1
    if not setup.training:
        return factor * (2 * used + attention) + FLOPS_A_BYTE * (stored + kv_cache(shape, setup).bytes) / setup.batch
    again = setup.checkpointing == "block"
    linears = 2 * used * ((2 if setup.frozen else 3) + again) + 6 * shape.layers * block_adapters(shape, setup)
    scores = attention * (3 + (setup.checkpointing != "none"))
    count, element = trained(shape, setup)
    moved = (2 + again) * stored + 3 * count * element + 2 * optimizer_states(shape, setup).bytes
    return factor * (linears + scores) + FLOPS_A_BYTE * moved / setup.tokens


def candidates(setup: Setup, given: set[str]) -> Iterator[Setup]:
    """The setups that differ in what is not given."""
    quantized = ("none", "nf4_double") if setup.training else ("none", "int8", "nf4_double")
    choices: dict[str, Sequence[Any]] = {"lora_rank": (0,), "quantized": quantized, "dtype": ("bf16", "fp32")}
    if setup.training:
        choices |= {"optimizer": OPTIMIZERS, "checkpointing": ("none", "block")}
        if not (setup.prompt or setup.prefix):
            choices["lora_rank"] = (0, RANK)
    else:
        choices |= {"dtype": ("bf16",), "kv_dtype": ("same", "fp8")}
    choices |= {name: (getattr(setup, name),) for name in choices if name in given}
    for values in product(*choices.values()):
        with contextlib.suppress(UserError):  # settings that exclude each other, such as 4-bit weights that are trained
            yield replace(setup, **dict(zip(choices, values, strict=True)))


def kind(setup: Setup) -> str:
    """Full fine-tuning, adapters, adapters over quantized weights; of inference the form of the weights."""
    return setup.quantized if setup.quantized != "none" else "adapters" if setup.frozen else "full"


def fitting(model: Model, setup: Setup, given: set[str], room: int) -> tuple[Setup, int] | None:
    """The setup with the largest micro-batch that fits, and its peak."""
    best = None
    for batch in [setup.batch] if "batch" in given else BATCHES:
        made = replace(setup, batch=batch)
        peak = model.predict(made)[-1].bytes
        if peak > room:
            break
        best = made, peak
    return best


def search(model: Model, setup: Setup, given: set[str], room: int, count: int = 3) -> list[Found]:
    """The fastest setting of each kind (full, adapters, quantized) that fits into MARGIN of `room` bytes, then the next
    fastest, at most `count`, by `cost`. UserError if nothing fits."""
    room = int(MARGIN * room)
    shape, found, least = model.shape, list[Any](), None
    model = replace(model, stored={})
    for at, candidate in enumerate(candidates(setup, given)):
        try:
            check_shape(model.name, shape, candidate)
        except UserError:  # such as adapters of a higher rank than a small model's layers
            continue
        best = fitting(model, candidate, given, room)
        if best is None:
            smallest = candidate if "batch" in given else replace(candidate, batch=1)
            needed = model.predict(smallest)[-1].bytes
            least = min(least or (needed, at, smallest), (needed, at, smallest))
            continue
        price = cost(shape, best[0])
        order = round(math.log(price, SAME)), at
        found.append((order, Found(*best, price, command(model, best[0], given))))
    if not found:
        assert least is not None
        raise UserError(
            f"no setting of {model.name} fits into the {size(room)} that are left for tensors; the least is "
            f"{size(least[0])} with {' '.join(options(least[2]))}"
        )
    found.sort(key=lambda pair: pair[0])
    distinct: dict[Any, Any] = {}  # in more than the optimizer
    for order, each in found:
        s = each.setup
        distinct.setdefault((kind(s), s.dtype, s.checkpointing, s.kv_dtype), (order, each))
    first: dict[str, Any] = {}
    for pair in distinct.values():
        first.setdefault(kind(pair[1].setup), pair)
    chosen = [*first.values(), *(pair for pair in distinct.values() if pair not in first.values())][:count]
    return [each for _, each in sorted(chosen, key=lambda pair: pair[0])]


def options(setup: Setup, given: Iterable[str] = ()) -> list[str]:
    """The options of `memory` for what differs from the defaults, or was given."""
    plain, words = Setup(), []
    for name, value in vars(setup).items():
        if value != getattr(plain, name) or name in given or name == "seq":
            key = name.replace("_", "-")
            words += [f"--{key}" if value else f"--no-{key}"] if isinstance(value, bool) else [f"--{key} {value}"]
    return words


def command(model: Model, setup: Setup, given: set[str]) -> str:
    """`run sft` where it has all of these settings and can find the weights; else `memory`."""
    known = {"batch", "seq", "packing", "dtype", "lora_rank", "lora_targets", "whole", "checkpointing"}
    plain = Setup()
    other = [name for name, value in vars(setup).items() if name not in known and value != getattr(plain, name)]
    if not model.weights or other or setup.dtype == "fp16":
        return " ".join(["python -m finetune memory", model.words or model.name, *options(setup, given)])
    words = [f"python -m finetune run sft --model {model.weights}"]
    words += [f"--method lora --rank {setup.lora_rank}" if setup.lora_rank else "--method full"]
    if setup.lora_rank and setup.lora_targets != "all":
        names = ("all-linear" if name == "all" else name for name in setup.named_targets)
        words.append(f"--targets {','.join(names)}")
    if setup.whole:
        words.append(f"--modules-to-save {setup.whole}")
    words.append(f"--dtype {'float32' if setup.dtype == 'fp32' else 'bfloat16'}")
    words.append(f"--batch {setup.batch} --max-length {setup.seq}")
    return " ".join([*words, *["--checkpointing"] * (setup.checkpointing == "block")])


def instead(model: Model, setup: Setup) -> dict[str, int]:
    """Peaks of setups that differ in one thing, by the option that makes the difference."""
    options: dict[str, dict[str, Any]] = {}
    if setup.training:
        other = "none" if setup.checkpointing == "block" else "block"
        options[f"--checkpointing {other}"] = {"checkpointing": other}
        if setup.checkpointing != "selective":
            other = {"flash": "naive", "naive": "flash"}[setup.attention]
            options[f"--attention {other}"] = {"attention": other}
        other = "full" if setup.loss == "chunked" else "chunked"
        options[f"--loss {other}"] = {"loss": other}
        options["--optimizer adamw8bit"] = {"optimizer": "adamw8bit"}
        if setup.frozen:
            other = "nf4_double" if setup.quantized == "none" else "none"
            options[f"--quantized {other}"] = {"quantized": other}
        if setup.quantized == "none" and not (setup.prompt or setup.prefix):
            rank = 0 if setup.lora_rank else 8
            options[f"--lora-rank {rank}"] = {"lora_rank": rank, "lora_targets": "all", "whole": "", "untied": False}
        for stage in (1, 2, 3):
            options[f"--zero {stage}"] = {"zero": stage}
        options["--offload optimizer"] = {"offload": "optimizer"}
    other = "bf16" if setup.dtype == "fp32" else "fp32"
    options[f"--dtype {other}"] = {"dtype": other}
    if setup.training:
        options["--optimizer none"] = {
            "optimizer": "none", "lora_rank": 0, "prompt": 0, "prefix": 0, "checkpointing": "none", "offload": "none",
            "whole": "", "untied": False,
        }  # fmt: skip
    found = {}
    for option, changes in options.items():
        with contextlib.suppress(UserError):  # it excludes another setting, or the model cannot have it
            made = replace(setup, **changes)
            if not model.module:  # whose row may be several documents
                check_shape(model.name, model.shape, made)
            if made != setup:
                plain = replace(model, stored={}) if "dtype" in changes else model
                found[option] = plain.predict(made)[-1].bytes
    return found
