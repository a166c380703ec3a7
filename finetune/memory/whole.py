"""The modules that are trained whole next to adapters (--whole, peft's modules_to_save), as finetune/peft/whole.py
takes them: a copy of each is trained, and the base's stays."""

from __future__ import annotations

import functools
from math import prod

from finetune.errors import UserError
from finetune.memory.setup import Setup, Shape

Tensors = list[tuple[int, tuple[int, ...], bool]]  # number of tensors, shape of each, whether it is a block's matrix


@functools.lru_cache(maxsize=1024)
def whole(shape: Shape, setup: Setup) -> dict[str, Tensors]:
    """The modules that are trained whole, by name, and their tensors. UserError for a name that means none."""
    if not setup.whole or not setup.training:
        return {}
    from finetune.peft.whole import choose  # imports torch, which other formulas do without

    if shape.family == "gpt":
        raise UserError("--whole: modules of a gpt are not trained next to adapters; take a llama")
    there = modules(shape, setup)
    tied = shape.tied and not setup.own_head(shape)
    chosen = choose(list(there), setup.whole.split(","), tied, shape.post_norms)
    return {name: there[name] for name in chosen}


def modules(shape: Shape, setup: Setup) -> dict[str, Tensors]:
    """A Llama's modules that are neither adapted nor quantized, as finetune/lm/llama.py names them."""
    c, table = shape.dim, (shape.vocab, shape.dim)
    found: dict[str, Tensors] = {"embed": [(1, table, False)]}
    inner: dict[str, Tensors] = {}
    targets = tuple(shape.linears) if setup.quantized != "none" else setup.targets(shape)
    for name, (a, b) in shape.linears.items():
        if name not in targets:
            at = "mlp" if name in ("gate", "up", "down") else "attn"
            inner[f"{at}.{name}"] = [(1, (b, a), True), (int(name in shape.biased), (b,), False)]
    if shape.qk_norm:
        inner |= {f"attn.{name}": [(1, (shape.head_dim,), False)] for name in ("q_norm", "k_norm")}
    norms = ("attn_norm", "mlp_norm", *(("attn_post_norm", "mlp_post_norm") if shape.post_norms else ()))
    inner |= {name: [(1, (c,), False)] for name in norms}
    found |= {f"blocks.{i}.{name}": tensors for i in range(shape.layers) for name, tensors in inner.items()}
    found["norm"] = [(1, (c,), False)]
    if (not shape.tied or setup.untied) and not setup.adapts_head:
        found["head"] = [(1, table, False)]
    return found


def whole_tensors(shape: Shape, setup: Setup) -> Tensors:
    return [tensor for tensors in whole(shape, setup).values() for tensor in tensors]


def whole_parameters(shape: Shape, setup: Setup) -> int:
    return sum(count * prod(size) for count, size, _ in whole_tensors(shape, setup))


def within_blocks(shape: Shape, setup: Setup) -> set[str]:
    """Which of a block's modules are trained whole: of all blocks, if they are of one."""
    return {name.rpartition(".")[2] for name in whole(shape, setup) if name.startswith("blocks.")}


def trains_embedding(shape: Shape, setup: Setup) -> bool:
    """Whether the embedding has a gradient."""
    return not setup.frozen or "embed" in whole(shape, setup)


def trains_head(shape: Shape, setup: Setup) -> bool:
    """Whether the projection to the vocabulary has a gradient that stays: itself, or as the embedding it is tied to."""
    names = whole(shape, setup)
    return not setup.frozen or "head" in names or ("embed" in names and shape.tied and not setup.own_head(shape))


def trains_below(shape: Shape, setup: Setup) -> bool:
    """Whether a gradient flows into the blocks: not where the head alone, or with the last norm, is trained."""
    if not setup.frozen or setup.prompt or setup.prefix or setup.targets(shape):
        return True
    return bool(set(whole(shape, setup)) - {"norm", "head"}) or trains_embedding(shape, setup)
