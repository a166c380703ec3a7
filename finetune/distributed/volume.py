"""What a step sends, by formula: bytes a rank for each kind of collective and group, as `Counts` counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from finetune.distributed import plan
from finetune.distributed.collectives import wire
from finetune.distributed.mesh import Layout, share, sizes
from finetune.distributed.stage import shapes


def of_step(
    config: plan.Config,
    layout: Layout,
    rank: int,
    *,
    rows: int,
    length: int,
    chunks: int = 1,
    sequence: bool = False,
    sharded: bool = False,
    width: int = 4,
) -> Counter[tuple[str, str]]:
    """Bytes that `rank` sends in one step's gradients and update, for a batch of `rows`; numbers have `width`
    bytes.

    Tensor parallelism: two all-reduces of (b, t, C) a layer in each direction (with sequence parallelism as many
    all-gathers and reduce-scatters), one behind the embedding, one before the head, and three of (b · t,) in the loss.
    Pipeline: one (b, t, C) to each side. Context: keys and values n − 1 times in each direction, their gradients n
    times. Data: the parameters once (all-reduce), or reduce-scattered and gathered. Gradients that several ranks of tp,
    or the first and the last stage, have shares of are summed once more. A few numbers for loss and norm are not in it.
    """
    place = layout.place(rank)
    found: Counter[tuple[str, str]] = Counter()

    def add(kind: str, group: str, size: int, message: float, times: float = 1) -> None:
        if size > 1 and message and times:
            found[kind, group] += round(times * wire(kind, size, int(message)))

    tp, pp, cp = layout.tp, layout.pp, layout.cp
    b, t = sizes(rows, layout.dp)[place["dp"]], length // cp
    activation = b * t * config.dim * width
    stages = [chunk * pp + place["pp"] for chunk in range(chunks)]
    first, last = stages[0] == 0, stages[-1] == pp * chunks - 1
    layers = sum(stop - start for start, stop in (share(config.layers, pp * chunks, n) for n in stages))
    times = 4 * layers + first + last
    if sequence and tp > 1:
        add("all_gather", "tp", tp, activation, times)
        add("reduce_scatter", "tp", tp, activation, times)
    else:
        add("all_reduce", "tp", tp, activation, times)
    add("all_reduce", "tp", tp, b * t * 4, 3 * last)
    sent = activation // tp if sequence else activation
    add("send", "pp", pp, sent, 2 * len(stages) - first - last)  # to the stage behind and to the one before
    kv = sizes(config.kv_heads, tp)[place["tp"]] * config.head_dim
    pair = 2 * b * t * kv * width
    add("send", "cp", cp, pair, layers * (2 * (cp - 1) + cp))

    group = layout.dp * cp
    own, partial, embedding = parameters(config, layout, place["tp"], stages, chunks, sequence)
    if sharded:
        add("reduce_scatter", "dp_cp", group, own * width)
        add("all_gather", "dp_cp", group, own * width)
    else:
        add("all_reduce", "dp_cp", group, own * width)
    add("all_reduce", "tp", tp, partial * width)
    if pp > 1 and place["pp"] in (0, pp - 1):
        add("all_reduce", "ends", 2, embedding * width)
    return found


def parameters(
    config: plan.Config, layout: Layout, tp_rank: int, stages: Iterable[int], chunks: int, sequence: bool
) -> tuple[int, int, int]:
    """Numbers of parameters on a rank: all, those whose gradients tp sums, those of a tied embedding."""
    tied = "head.weight" not in shapes(config)
    count = layout.pp * chunks
    own = partial = embedding = 0
    stages = list(stages)
    blocks = {layer for n in stages for layer in range(*share(config.layers, count, n))}
    for name, shape in shapes(config).items():
        layer = name.split(".")
        if layer[0] == "blocks":
            here = int(layer[1]) in blocks
        elif layer[0] == "embed":
            here = 0 in stages or (tied and count - 1 in stages)
        else:
            here = (0 if layer[0] == "positions" else count - 1) in stages
        if here:
            piece = plan.piece(config, name, shape, layout.tp, tp_rank, sequence)
            size = piece.local.numel()
            own += size
            partial += size * piece.partial
            embedding += size * (tied and layer[0] == "embed")
    return own, partial, embedding
