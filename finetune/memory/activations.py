"""Bytes that a training step needs for a while: activations kept for the backward pass, the loss, gradients in flight.

Activations follow the method of Korthikanti et al. 2022 (arXiv:2205.05198, §4: add up what each operation keeps for its
backward pass) applied to the operations of this project, which keep less than theirs: norms keep their input and one
or two fp32 numbers a row, attention its q, k, v, output and two numbers a row and head instead of T×T matrices, and
there is no dropout mask. A tensor that two operations keep is counted once.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from finetune.memory.counts import block_adapters, block_parameters, outputs
from finetune.memory.setup import Setup, Shape, Term
from finetune.memory.states import gradients
from finetune.memory.whole import trains_below, trains_embedding, trains_head, whole, within_blocks

# What sequence parallelism divides along the row: all between the layers' parts (Korthikanti et al. 2022, §4.2).
ALONG_THE_ROW = ("norm 1: input, statistics", "q, k, v: input", "norm 2: input, statistics", "MLP: input",
                 "norm behind attention: input, statistics", "norm behind MLP: input, statistics")  # fmt: skip


CAPPED_CHUNK = 1 << 24  # numbers of a chunk in finetune/lm/head.py: its CHUNK


def block_saved(shape: Shape, setup: Setup, first: bool = False) -> dict[str, tuple[int, str]]:
    """Tensors that one block keeps of a token for its backward pass: name → (bytes, formula).

    Frozen linear layers keep nothing (their dx needs the weight alone); one that is trained, or has an adapter, keeps
    its input; an adapter also the r numbers between A and B, and its input in fp32 where activations are bf16; DoRA
    each output before it is scaled. The `first` block of a LoRA model has an input without gradient: nothing before its
    first adapter is kept, and with a prefix nothing before its keys. Modules that are trained whole next to adapters
    count as those of full fine-tuning.
    """
    e, c, f, heads, kv = setup.element, shape.dim, shape.hidden, shape.heads, shape.kv_heads
    llama, linears, targets = shape.family == "llama", shape.linears, setup.targets(shape)
    copies = within_blocks(shape, setup)
    active = (*targets, *copies) if setup.frozen else tuple(linears)  # layers with something to train
    norm = 4 if llama else 8  # 1/rms; or mean and 1/std: fp32
    wide, width = (4, "4") if shape.wide_norms else (e, "e")
    saved: dict[str, tuple[int, str]] = {}

    def any_of(*names: str) -> bool:
        return any(name in active for name in names)

    def keeps_norm(name: str) -> None:
        saved[name] = c * wide + norm, f"C·{width} + {norm}"

    flowing = not first or bool(setup.prompt) or trains_embedding(shape, setup)  # does a gradient flow through here?
    flowing = flowing or "attn_norm" in copies
    if flowing:
        keeps_norm("norm 1: input, statistics")
    if any_of("q", "k", "v", "qkv"):
        saved["q, k, v: input"] = c * e, "C·e"
        flowing = True
    flowing = flowing or any_of("q_norm", "k_norm")
    if flowing and shape.qk_norm:
        saved["norms of q, k: input, statistics"] = (
            (heads + kv) * (shape.head_dim * wide + 4),
            f"(H + K)·(D·{width} + 4)",
        )
    flowing = flowing or bool(setup.prefix)
    if flowing and (setup.attention == "flash" or setup.checkpointing == "selective"):
        saved["attention: q, k, v"] = (heads + 2 * kv) * shape.head_dim * e, "(H + 2·K)·D·e"
        if setup.attention == "flash":
            saved["attention: maxima, sums"] = 8 * heads, "8·H"
    elif flowing:  # the reference widens all three to fp32 and k, v to all heads
        saved["attention: q, k, v"] = 12 * heads * shape.head_dim, "12·H·D"
        maps, keys = 12 if shape.capped_scores else 8, "T" if setup.packing == 1 else "k"
        matrices = (maps * heads + 1) * setup.document + 1, f"({maps}·H + 1)·{keys} + 1"
        saved["attention: T×T probabilities, twice; masks"] = matrices
    if any_of("o") or (flowing and setup.attention == "flash"):
        saved["attention: output"] = heads * shape.head_dim * e, "H·D·e"
    flowing = flowing or any_of("o")
    if flowing and shape.post_norms:
        keeps_norm("norm behind attention: input, statistics")
    flowing = flowing or "mlp_norm" in copies
    if flowing:
        keeps_norm("norm 2: input, statistics")
    if any_of("gate", "up"):
        saved["MLP: input"] = c * e, "C·e"
        flowing = True
    if flowing:
        inner = (3 if shape.gelu else 2) if llama else 1
        saved["MLP: before the non-linearity"] = inner * f * e, f"{inner}·F·e"
    if any_of("down"):
        saved["down: input"] = f * e, "F·e"
    if (flowing or any_of("down")) and shape.post_norms:
        keeps_norm("norm behind MLP: input, statistics")
    if targets:
        saved["adapters: x·Aᵀ"] = 4 * setup.lora_rank * len(targets), f"{4 * len(targets)}·r"
        if setup.adapter == "dora":
            saved["DoRA: outputs unscaled"] = outputs(shape, setup) * e, "O·e"
    return saved


def block(shape: Shape, setup: Setup, first: bool = False) -> Term:
    saved = block_saved(shape, setup, first)
    if not setup.sequence_parallel:
        text = f"N·({' + '.join(text for _, text in saved.values())})"
        return Term("activations of a block", setup.tokens * sum(size for size, _ in saved.values()), text, "")
    along = {name: saved.pop(name) for name in ALONG_THE_ROW if name in saved}
    each, cut = (sum(size for size, _ in kinds.values()) for kinds in (saved, along))
    text = (
        f"N·({' + '.join(text for _, text in saved.values())}) + N/t·({' + '.join(text for _, text in along.values())})"
    )
    return Term("activations of a block", setup.tokens * each + setup.tokens // setup.tp * cut, text, "")


def megatron_layer(
    seq: int, batch: int, dim: int, heads: int, ranks: int = 1, sequence: bool = False, selective: bool = False
) -> float:
    """Bytes that one layer of Megatron-LM keeps, 16-bit, with dropout: s·b·h·(10 + 24/t + 5·a·s/(h·t)) on t
    tensor-parallel ranks, all of it divided by t with `sequence` parallelism, without the last summand where attention
    is computed again (`selective`). Korthikanti et al. 2022 (arXiv:2205.05198), §4; not this project's layers."""
    scores = 0 if selective else 5 * heads * seq / dim
    each = (34 + scores) / ranks if sequence else 10 + (24 + scores) / ranks
    return seq * batch * dim * each


def activations(shape: Shape, setup: Setup) -> Term:
    """Tensors that are alive between a forward pass and its backward pass.

    Without checkpointing those that L blocks keep; with it (Chen et al. 2016, arXiv:1604.06174) the input of each. Then
    the last norm's input and statistics, the loss's input, and positions, targets and (if its table is trained) the
    embedding's tokens, 8 bytes each. A pipeline's first stage has as many micro-batches in flight as there are stages.
    A head with an adapter is W + s B A for the loss, which keeps it. Where nothing below it is trained, the blocks keep
    nothing.
    """
    if not setup.training:
        return Term("activations", 0, "0", "inference keeps nothing")
    n, width, norm = setup.tokens, shape.dim * setup.element, 4 if shape.family == "llama" else 8
    last = 4 * shape.dim if shape.wide_norms else width
    ends = "C·e + C·4" if shape.wide_norms else "2·C·e"
    cut = setup.tp if setup.sequence_parallel else 1
    part = "N/t" if setup.sequence_parallel else "N"
    if setup.checkpointing == "block":
        blocks, text = shape.layers * (n // cut) * width, f"{part}·L·C·e"
    else:
        each, first = block(shape, setup), block(shape, setup, first=shape.first)
        blocks = (shape.layers - 1) * each.bytes + first.bytes
        inner = f"({each.formula})" if setup.sequence_parallel else each.formula  # a sum, or a product
        text = f"L·{inner}" if each == first else f"(L - 1)·{inner} + {first.formula}"
    integers = 24 if trains_embedding(shape, setup) else 16
    if not trains_below(shape, setup):
        blocks, text, integers = 0, "0", 8
        last, norm, ends = (last, norm, ends) if "norm" in whole(shape, setup) else (0, 0, "C·e")
    if not shape.last:
        total, text = blocks + n * integers, f"{text} + N·{integers}"
    elif cut == 1:
        total, text = blocks + n * (width + last + norm + integers), f"{text} + N·({ends} + {norm + integers})"
    else:
        total = blocks + n // cut * (width + last + norm) + n * integers
        text = f"{text} + N/t·({ends} + {norm}) + N·{integers}"
    if setup.adapter == "dora" and setup.lora_rank:  # the factors of the outputs, and the norms in them
        total, text = total + shape.layers * 8 * outputs(shape, setup), f"{text} + L·O·8"
    if setup.adapts_head:
        total, text = total + head_bytes(shape, setup), f"{text} + {head_text(setup)}"
    if setup.prefix:  # each row's copy, in addition to its own keys and values
        size = setup.batch * setup.prefix * 2 * shape.kv_heads * shape.head_dim * setup.element
        total, text = total + shape.layers * size, f"{text} + L·B·A·2·K·D·e"
    if shape.in_flight > 1:
        total, text = total * shape.in_flight, f"p·({text})"
    return Term("activations", total, text, "what each op saves, once a tensor")


def head_bytes(shape: Shape, setup: Setup) -> int:
    """W + s B A of a head with an adapter; of DoRA also what is scaled, in fp32, the factors and the rows' norms."""
    table = shape.vocab * shape.dim
    return table * setup.element + (4 * table + 8 * shape.vocab if setup.adapter == "dora" else 0)


def head_text(setup: Setup) -> str:
    return "V·C·e" + (" + V·C·4 + V·8" if setup.adapter == "dora" else "")


def loss_plan(shape: Shape, setup: Setup) -> tuple[int, int, int]:
    """(rows of a chunk, tiles of the vocabulary, blocks of rows) of ops.linear_cross_entropy, for products in fp32, by
    the kernel's own rule (LossPlan of csrc/include/finetune/linear_cross_entropy.h); of other losses their chunk."""
    if shape.capped_logits or setup.loss == "logprobs":
        return min(setup.tokens, max(1, CAPPED_CHUNK // shape.vocab)), 0, 0
    return plan_of_kernel(setup.tokens, shape.vocab)


@functools.cache
def plan_of_kernel(tokens: int, vocab: int) -> tuple[int, int, int]:
    from finetune.ops.linear_cross_entropy import plan  # imports torch, which other formulas do without

    return plan(tokens, vocab)


def logits(shape: Shape, setup: Setup) -> Term:
    """Memory of the loss without its input and its head. Chunked: a chunk of fp32 logits, each tile's part of the
    gradient of its input, maxima and sums, and the gradients that the forward pass makes: of all inputs, and of the
    head where it or its adapter is trained (Hsu et al. 2024, arXiv:2410.10989). Full: log-probabilities, their gradient
    and the logits' gradient, N·V fp32 each. Log-probabilities: a chunk of logits, made again in the backward pass, and
    their gradient. Inference: the last position's logits of each row."""
    n, e, c, v = setup.tokens, setup.element, shape.dim, shape.vocab
    if not shape.last:
        return Term("logits", 0, "0", "on the last stage")
    if not setup.training:
        return Term("logits", setup.batch * v * 4, "B·V·4", "generate.py: the last position only")
    if setup.loss == "full":
        return Term("logits", 3 * n * v * 4, "3·N·V·4", "torch.nn.functional.cross_entropy")
    chunk, tiles, blocks = loss_plan(shape, setup)
    learned = trains_head(shape, setup) or setup.adapts_head
    if shape.capped_logits:  # tanh, log-probabilities and the gradients of both; inputs once more, and their gradient
        each = 12 if setup.loss == "logprobs" else 16  # no log-probabilities of the whole vocabulary
        total, text = each * chunk * v + 2 * n * c * e, f"{each}·S·V + 2·N·C·e"
        if learned and chunk < n:
            total, text = total + v * c * e, text + " + V·C·e"
        return Term("logits", total, text, f"finetune/lm/head.py, {chunk} tokens a chunk")
    if setup.loss == "logprobs":
        total, text = 2 * chunk * v * e + n * c * e, "2·S·V·e + N·C·e"
        if learned:
            total, text = total + v * c * e, text + " + V·C·e"
        return Term("logits", total, text, f"finetune/alignment/logprobs.py, {chunk} tokens a chunk")
    parts = tiles * chunk
    total, text = chunk * v * 4 + parts * (c * 4 + 12) + n * c * e, "S·V·4 + J·(C·4 + 12) + N·C·e"
    if e < 4:
        total, text = total + chunk * c * 4, text + " + S·C·4"
    if learned:
        several = blocks > 1 or e < 4
        total, text = total + v * c * (e + 4 * blocks * several), text + " + V·C·" + ("(e + 4·U)" if several else "e")
    return Term("logits", total, text, f"ops.linear_cross_entropy, {chunk} tokens a chunk")


def step_growth(shape: Shape, setup: Setup) -> Term:
    """Memory that a training step adds at its peak to weights and optimizer states: the largest of five moments.

    In the loss: all activations and the loss's own. In the backward of a head with DoRA: three gradients of its size,
    the loss's copy of it gone. In the last block's backward: the blocks' activations, the head's gradient, and
    gradients that pass through the MLP (of its output, of gate and up). In the first block's: its activations and
    nearly all gradients. At the end: all gradients; a tied table's comes in two parts until then, from the head and
    from the embedding. Between the last and the first block the sum changes evenly, so its ends suffice.
    """
    n, e, c, v = setup.tokens, setup.element, shape.dim, shape.vocab
    saved = activations(shape, setup).bytes
    waiting = saved // shape.in_flight * (shape.in_flight - 1)  # of other micro-batches of a pipeline
    gone = setup.buffers or setup.offload != "none"  # a gradient leaves as soon as it is whole
    all_gradients = 0 if gone else gradients(shape, setup).bytes
    head = v * c * e if trains_head(shape, setup) and shape.last else 0
    table = head if shape.tied and shape.first and not setup.own_head(shape) else 0
    adapted = head_bytes(shape, setup) if setup.adapts_head else 0
    passing = n * (c + (2 if shape.family == "llama" else 1) * shape.hidden) * e
    one = block(shape, setup).bytes
    again = 0  # computed again
    if setup.checkpointing == "block":
        again = one
    elif setup.checkpointing == "selective":
        again = block(shape, replace(setup, checkpointing="none")).bytes - one
    inputs = n * 2 * c * e + adapted if shape.last else 0  # of the last norm and the loss: gone by then
    if (setup.zero >= 2 and setup.ranks > 1) or gone:  # a block's gradients are whole until they are summed or moved
        passing += block_adapters(shape, setup) * 4 if setup.frozen else block_parameters(shape) * e
    moments = {
        "in the loss: activations + logits": saved + logits(shape, setup).bytes,
        "in the head's backward, with DoRA: activations + fp32 gradients": (
            saved + n * c * e + v * c * (12 - e) if adapted and setup.adapter == "dora" else 0
        ),
        "in the last block's backward: activations + gradients in flight": saved - inputs + again + head + passing,
        "in the first block's backward: gradients + gradients in flight": waiting + all_gradients + one + passing,
        "at the backward's end: gradients": waiting + all_gradients + table,
    }
    text = max(moments, key=lambda moment: moments[moment])
    return Term("step growth", moments[text], text, "")
