"""Memory of a language model, predicted from its shape: integer bytes of one rank, nothing allocated.

`predict` lists the terms of a setup. Their formulas are in three files: `counts.py` (numbers), `states.py` (bytes that
stay from step to step) and `activations.py` (bytes that a step needs for a while). Each formula is printed next to its
value, and `symbols` has the letters to evaluate it.
"""

from __future__ import annotations

from dataclasses import replace

from finetune.memory.activations import activations, logits, loss_plan, step_growth
from finetune.memory.counts import (
    block_adapters,
    blocks_of_64,
    constants_of_blocks,
    factors,
    head_adapter,
    linear_weights,
    output_rows,
    outputs,
    parameters,
    quantized_blocks,
    trained,
    trained_matrices,
    whole_at_once,
)
from finetune.memory.parallel import parts
from finetune.memory.setup import Setup, Shape, Term
from finetune.memory.states import companions, gathered, gradients, kv_cache, optimizer_states, weights
from finetune.memory.whole import whole_parameters


def predict(shape: Shape, setup: Setup) -> list[Term]:
    """The rows of the table for one setup, of the rank that needs most; the last is the peak of its device."""
    return max((of_part(part, setup) for part in parts(shape, setup)), key=lambda terms: terms[-1].bytes)


def largest(shape: Shape, setup: Setup) -> Shape:
    """The part of the model that `predict` is of."""
    return max(parts(shape, setup), key=lambda part: of_part(part, setup)[-1].bytes)


def host_bytes(terms: list[Term]) -> int:
    """What the terms need of the host's memory, for this rank."""
    return sum(term.bytes for term in terms if term.host)


def of_part(shape: Shape, setup: Setup) -> list[Term]:
    whole = gathered(shape, setup)
    if not setup.training:
        terms = [weights(shape, setup), *([whole] if whole.bytes else []), kv_cache(shape, setup), logits(shape, setup)]
        names = " + ".join(term.name for term in terms if not term.host)
        return [*terms, Term("peak", sum(t.bytes for t in terms if not t.host), names, "")]
    kept = [weights(shape, setup), gradients(shape, setup), optimizer_states(shape, setup)]
    growth, others = step_growth(shape, setup), companions(shape, setup)
    if setup.algorithm == "rlhf":  # both forward passes come before both backward passes
        others += [replace(activations(shape, setup), name="value model's activations")]
    stay = [kept[0], *([kept[1]] if setup.buffers else []), kept[2], *others, *([whole] if whole.bytes else [])]
    stay = [term for term in stay if not term.host]
    names = " + ".join([term.name for term in stay] + [growth.name])
    peak = Term("peak", sum(term.bytes for term in stay) + growth.bytes, names, "")
    rest = [*others, *([whole] if whole.bytes else [])]
    return [*kept, *rest, activations(shape, setup), logits(shape, setup), growth, peak]


# The letters of the formulas, in English and Chinese.
MEANING = {
    "L": ("layers", "层数"),
    "C": ("width", "宽度"),
    "F": ("MLP width", "MLP 宽度"),
    "V": ("vocabulary", "词表大小"),
    "M": ("maximum length", "最大长度"),
    "H": ("heads", "头数"),
    "K": ("key–value heads", "KV 头数"),
    "D": ("head size", "每个头的维数"),
    "P": ("parameters", "参数量"),
    "B": ("rows", "行数"),
    "T": ("tokens a row", "每行 token 数"),
    "N": ("tokens, B·T", "token 总数 B·T"),
    "e": ("bytes a number: 4 in fp32, 2 in 16 bits", "每个数的字节数：fp32 为 4，16 位为 2"),
    "r": ("LoRA rank", "LoRA 的秩"),
    "R": (
        "adapter parameters a block, Σ r·(in + out), with DoRA + Σ out",
        "每个块的 adapter 参数 Σ r·(in + out)，DoRA 另加 Σ out",
    ),
    "O": ("Σ out of a block's layers with an adapter", "每个块中带 adapter 的层的 Σ out"),
    "h": ("adapter parameters of the head, r·(C + V), with DoRA + V", "输出层的 adapter 参数 r·(C + V)，DoRA 另加 V"),
    "w": ("numbers in modules trained whole next to adapters", "与 adapter 一起完整训练的模块的参数量"),
    "I": ("weights of a block's linear layers", "每个块的线性层的权重数"),
    "A": ("virtual tokens that are trained", "可训练的虚拟 token 数"),
    "X": ("blocks of 64 weights in a block's linear layers", "每个块的线性层中每 64 个权重一组的组数"),
    "Y": ("absmax of 256 blocks of 64, and a mean a layer", "每 256 组一个的最大值，以及每层一个均值"),
    "Z": ("rows of a block's linear layers", "每个块的线性层的行数"),
    "W": ("ranks", "进程数"),
    "g": ("bytes of a number of the gradients", "梯度每个数的字节数"),
    "m": ("trained numbers in the blocks' matrices", "各块矩阵中可训练的数"),
    "v": ("other trained numbers: tables, norms, biases", "其余可训练的数：词表、归一化、偏置"),
    "f": ("rows and columns of the trained matrices, elements of vectors", "可训练矩阵的行数与列数，向量的元素数"),
    "t": ("tensor-parallel ranks", "张量并行的进程数"),
    "p": ("micro-batches in flight in a pipeline", "流水线中同时在途的 micro-batch 数"),
    "k": ("tokens of a document", "每个文档的 token 数"),
    "Q": ("blocks of 256 trained parameters", "每 256 个可训练参数一块的块数"),
    "S": ("tokens in a chunk of the loss", "损失每次处理的 token 数"),
    "J": (
        "rows of partial input gradients: S for each tile of the vocabulary",
        "输入梯度部分和的行数：词表每个分块有 S 行",
    ),
    "U": ("partial sums of the head's gradient in fp32", "输出层梯度的 fp32 部分和的份数"),
    "G": ("parameters whole at once with ZeRO-3", "ZeRO-3 同时完整的参数量"),
    "b": ("tokens in a block of a paged cache", "分页缓存每块的 token 数"),
}


def symbols(shape: Shape, setup: Setup) -> dict[str, int]:
    """The values of the letters, as `MEANING` explains them, for the part of the model that a rank holds."""
    shape = largest(shape, setup)
    chunk, tiles, blocks = loss_plan(shape, setup)
    return {
        "L": shape.layers,
        "C": shape.dim,
        "F": shape.hidden,
        "V": shape.vocab,
        "M": shape.max_length,
        "H": shape.heads,
        "K": shape.kv_heads,
        "D": shape.head_dim,
        "P": parameters(shape),
        "B": setup.batch,
        "T": setup.seq,
        "N": setup.tokens,
        "e": setup.element,
        "r": setup.lora_rank,
        "R": block_adapters(shape, setup),
        "O": outputs(shape, setup),
        "h": head_adapter(shape, setup),
        "w": whole_parameters(shape, setup),
        "I": linear_weights(shape),
        "A": setup.prompt or setup.prefix,
        "X": blocks_of_64(shape),
        "Y": constants_of_blocks(shape),
        "Z": output_rows(shape),
        "W": setup.ranks,
        "g": setup.gradient,
        "m": trained_matrices(shape, setup),
        "v": trained(shape, setup)[0] + whole_parameters(shape, setup) - trained_matrices(shape, setup),
        "f": factors(shape, setup),
        "t": setup.tp,
        "p": shape.in_flight,
        "k": setup.document,
        "Q": quantized_blocks(shape, setup),
        "S": chunk,
        "J": tiles * chunk,
        "U": blocks,
        "G": whole_at_once(shape),
        "b": setup.kv_block,
    }
