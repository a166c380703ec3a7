"""The cheat sheet's settings: what each changes, which terms of `predict` it shows, how their formulas come about, and
who published them. `learning/CHEAT_SHEET.md` prints them; `python -m finetune memory NAME --measure` measures them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune.memory.activations import block
from finetune.memory.formulas import largest, predict
from finetune.memory.setup import Setup, Shape, Term

RANKS, RANK = 8, 8  # of the settings with ZeRO and with LoRA


@dataclass(frozen=True)
class Entry:
    """`changes` are made to a plain setup (`plain`)."""

    name: tuple[str, str]  # English, Chinese
    changes: dict[str, Any]
    terms: tuple[str, ...]
    why: tuple[str, str]
    sources: tuple[str, ...]

    def setup(self, base: Setup) -> Setup:
        return replace(plain(base), **self.changes)

    def predicted(self, shape: Shape, base: Setup) -> dict[str, Term]:
        setup = self.setup(base)
        known = {term.name: term for term in [block(largest(shape, setup), setup), *predict(shape, setup)]}
        return {name: known[name] for name in self.terms}


def plain(base: Setup) -> Setup:
    """Full fine-tuning in fp32 of as many tokens as `base` has."""
    return Setup(batch=base.batch, seq=base.seq)


NOT_MEASURED = {"tp", "offload", "grad_dtype"}  # settings that no trainer here has yet: formulas alone


def entries_for(shape: Shape) -> Iterator[Entry]:
    """Those that are measured on a model of this shape: adapters are for linear layers without biases."""
    for entry in ENTRIES:
        if not NOT_MEASURED & set(entry.changes) and (shape.family == "llama" or "lora_rank" not in entry.changes):
            yield entry


STATES = ("weights", "gradients", "optimizer states")
ZERO = "arXiv:1910.02054"

ENTRIES = (
    Entry(
        ("fp32, AdamW", "fp32，AdamW"),
        {},
        STATES,
        (
            "Weights: the table V·C (twice where the head is not tied to it), in each block q and o with C·H·D, k "
            "and v "
            "with C·K·D, three MLP matrices C·F and two norms C, and the last norm C. A gradient is like its "
            "parameter; "
            "AdamW keeps two fp32 moments of it. Together 16 bytes a parameter.",
            "权重：词表 V·C（输出层不共享时两份），每个块有 q、o 各 C·H·D，k、v 各 C·K·D，三个 MLP 矩阵 C·F，"
            "两个归一化 C，最后还有一个"
            "归一化 C。梯度与参数同形；AdamW 为它保存两个 fp32 矩。合计每个参数 16 字节。",
        ),
        ("arXiv:1711.05101",),
    ),
    Entry(
        ("16 bits with an fp32 master, AdamW", "16 位加 fp32 主副本，AdamW"),
        {"dtype": "bf16"},
        STATES,
        (
            "Two bytes for the weight and two for the gradient; the optimizer adds to its moments a copy of the "
            "weight "
            "in fp32, because an update is often smaller than the last bit of 16. Again 16 bytes a parameter: what 16 "
            "bits save is in the activations.",
            "权重与梯度各两字节；优化器除两个矩外还保存一份 fp32 权重，因为更新量常小于 16 位的最后一位。"
            "合计仍是每个参数 16 字节："
            "16 位节省的是激活。",
        ),
        ("arXiv:1710.03740", ZERO),
    ),
    Entry(
        ("16 bits, 8-bit AdamW", "16 位，8 位 AdamW"),
        {"dtype": "bf16", "optimizer": "adamw8bit"},
        ("optimizer states",),
        (
            "The moments in a byte each, with one fp32 maximum each for every 256 numbers; the fp32 master stays.",
            "每个矩一个字节，每 256 个数各有一个 fp32 最大值；fp32 主副本仍在。",
        ),
        ("arXiv:2110.02861",),
    ),
    Entry(
        ("SGD with momentum", "带动量的 SGD"),
        {"optimizer": "sgd_momentum"},
        ("optimizer states",),
        (
            "One number for each parameter; SGD without momentum keeps none.",
            "每个参数一个数；没有动量的 SGD 什么都不保存。",
        ),
        ("arXiv:1609.04747",),
    ),
    Entry(
        ("Muon", "Muon"),
        {"optimizer": "muon"},
        ("optimizer states",),
        (
            "One momentum for the matrices of the blocks, whose update is made orthogonal; tables, norms and biases "
            "are AdamW's, with two moments.",
            "块中的矩阵只有一个动量，更新量经正交化；词表、归一化与偏置仍用 AdamW，保存两个矩。",
        ),
        ("arXiv:2502.16982",),
    ),
    Entry(
        ("Adafactor", "Adafactor"),
        {"optimizer": "adafactor"},
        ("optimizer states",),
        (
            "The second moment of a matrix as the product of the means of its rows and of its columns, and no first "
            "moment: n + m numbers instead of 2·n·m.",
            "矩阵的二阶矩用行均值与列均值的乘积近似，不保存一阶矩：n + m 个数，而不是 2·n·m。",
        ),
        ("arXiv:1804.04235",),
    ),
    Entry(
        ("16 bits, fp32 gradients", "16 位，fp32 梯度"),
        {"dtype": "bf16", "grad_dtype": "fp32"},
        STATES,
        (
            "Gradients of many micro-batches are summed in fp32 buffers that stay: 18 bytes a parameter.",
            "多个 micro-batch 的梯度累加在常驻的 fp32 缓冲区里：每个参数 18 字节。",
        ),
        ("arXiv:1710.03740",),
    ),
    Entry(
        ("offload of the optimizer", "优化器卸载到主存"),
        {"dtype": "bf16", "offload": "optimizer"},
        STATES,
        (
            "The device keeps 2 of 16 bytes a parameter; gradients and states are in the host's memory, where the "
            "update is computed.",
            "设备上每个参数只留 16 字节中的 2 字节；梯度与优化器状态在主存里，更新也在那里计算。",
        ),
        ("arXiv:2101.06840",),
    ),
    Entry(
        ("LoRA", "LoRA"),
        {"dtype": "bf16", "lora_rank": RANK},
        (*STATES, "activations"),
        (
            "A (r × in) and B (out × r) next to a frozen matrix are r·(in + out) numbers, in fp32; gradients and "
            "moments "
            "exist for them alone. Activations stay: an adapter needs its layer's input too, and adds its r numbers.",
            "冻结矩阵旁的 A (r × in) 与 B (out × r) 共 r·(in + out) 个 fp32 数；梯度与矩只为它们存在。激活并不减少："
            "adapter 同样需要该层"
            "的输入，还要加上中间的 r 个数。",
        ),
        ("arXiv:2106.09685",),
    ),
    Entry(
        ("LoRA over NF4, quantized twice (QLoRA)", "双重量化 NF4 上的 LoRA（QLoRA）"),
        {"dtype": "bf16", "lora_rank": RANK, "quantized": "nf4_double"},
        ("weights",),
        (
            "Frozen weights need no more precision than their use: 4 bits, the index of one of 16 quantiles of a "
            "normal distribution, times the largest magnitude of their 64. Those are stored in 8 bits in turn, "
            "less their mean, with one fp32 maximum for 256 of them: 4.13 bits a weight. "
            "Tables and norms stay in 16 bits.",
            "冻结的权重只需够用的精度：4 位，即正态分布 16 个分位数之一的下标，乘以所在 64 个权重的最大绝对值。"
            "这些最大值减去均值后再存为 8 位，每 256 个配一个 fp32 最大值：每个权重 4.13 位。词表与归一化仍为 16 位。",
        ),
        ("arXiv:2305.14314",),
    ),
    Entry(
        ("LoRA over int8", "int8 上的 LoRA"),
        {"dtype": "bf16", "lora_rank": RANK, "quantized": "int8"},
        ("weights",),
        (
            "A byte a weight, and the largest magnitude of each row.",
            "每个权重一个字节，外加每行的最大绝对值。",
        ),
        ("arXiv:2208.07339",),
    ),
    Entry(
        ("activations, flash attention", "激活，flash attention"),
        {},
        ("activations of a block", "activations"),
        (
            "Add up what each operation keeps for its backward pass, a tensor once: a linear layer and a norm their "
            "input, a norm its statistics, attention q, k, v, its output and two numbers a query and head (the "
            "softmax is computed again from them), the MLP what goes into the non-linearity and into the last matrix. "
            "Outside of the blocks: the last norm's and the loss's input, and token numbers.",
            "把每个运算为反向传播保存的东西相加，同一张量只计一次：线性层与归一化保存输入，归一化还有统计量；"
            "注意力保存 q、k、v、输出，以及每个"
            "查询和头的两个数（softmax 由它们重算）；MLP 保存非线性的输入和最后一个矩阵的输入。块之外："
            "最后归一化与损失的输入，以及 token 编号。",
        ),
        ("arXiv:2205.05198", "arXiv:2307.08691"),
    ),
    Entry(
        ("activations, T×T attention", "激活值，T×T 注意力"),
        {"attention": "naive"},
        ("activations of a block", "activations"),
        (
            "Without an online softmax the probabilities of every pair stay: for each head T numbers a token, here "
            "twice and in fp32, with the mask, and k and v for every query head. This is what flash attention does "
            "not keep.",
            "没有在线 softmax 时，每一对位置的概率都要保存：每个头、每个 token T 个数，这里以 fp32 存两份，另有 mask，"
            "k、v 扩展到每个 query 头。"
            "这正是 flash attention 不保存的部分。",
        ),
        ("arXiv:2205.14135",),
    ),
    Entry(
        ("activations, checkpointing", "激活值，activation checkpointing"),
        {"checkpointing": "block"},
        ("activations",),
        (
            "Only the input of each block stays; a block's own activations exist again for a while in its backward "
            "pass, for one forward pass more of arithmetic.",
            "只保留每个块的输入；反向经过某块时它的激活短暂重现，代价是多一次前向计算。",
        ),
        ("arXiv:1604.06174",),
    ),
    Entry(
        ("activations, T×T attention computed again", "激活值，重算 T×T 注意力"),
        {"attention": "naive", "checkpointing": "selective"},
        ("activations of a block", "activations"),
        (
            "Scores and probabilities are most of the memory and little of the arithmetic: only they are computed "
            "again. Flash attention does the same inside one kernel.",
            "分数与概率占内存最多、计算量却很小：只重算它们。flash attention 在一个 kernel 内做的就是这件事。",
        ),
        ("arXiv:2205.05198",),
    ),
    Entry(
        (f"tensor and sequence parallelism, {RANKS} ranks", f"张量与序列并行，{RANKS} 个进程"),
        {"dtype": "bf16", "tp": RANKS, "sequence_parallel": True},
        (*STATES, "activations of a block", "activations"),
        (
            "Each rank has 1/t of the heads, of the MLP and of the vocabulary (so H, K, F, V and P in these rows are "
            "those of a rank), and 1/t of the tokens of what lies between: norms and the inputs of the matrices.",
            "每个进程有 1/t 的头、MLP 与词表（这几行的 H、K、F、V、P 都是单个进程的），"
            "以及介于其间的部分（归一化、矩阵输入）1/t 的 token。",
        ),
        ("arXiv:1909.08053", "arXiv:2205.05198"),
    ),
    Entry(
        ("logits, all at once", "logits，一次全部"),
        {"loss": "full"},
        ("logits",),
        (
            "Cross entropy holds log-probabilities, their gradient and the logits' gradient: three numbers for every "
            "token and word of the vocabulary, in fp32.",
            "交叉熵同时持有对数概率、其梯度和 logits 的梯度：每个 token 对词表中每个词三个 fp32 数。",
        ),
        ("arXiv:2410.10989",),
    ),
    Entry(
        ("logits, in chunks", "logits，分块"),
        {},
        ("logits",),
        (
            "Only a chunk of S tokens has logits. The forward pass makes the gradients at once: of the input (N·C), "
            "summed from a part for each tile of the vocabulary, and of the head (V·C).",
            "只有 S 个 token 的 logits 同时存在。前向时就把梯度算好：输入的梯度 N·C 由词表各分块的部分和相加，"
            "输出层的梯度 V·C。",
        ),
        ("arXiv:2410.10989",),
    ),
    Entry(
        ("inference", "推理"),
        {"dtype": "bf16", "optimizer": "none"},
        ("weights", "KV cache", "logits"),
        (
            "A key and a value of D numbers for each layer, KV head and token: grouped queries divide it by H/K. "
            "Logits "
            "of the last position only.",
            "每层、每个 KV 头、每个 token 各有 D 个数的 key 与 value：GQA 把它除以 H/K。logits 只算最后一个位置。",
        ),
        ("arXiv:2305.13245",),
    ),
    Entry(
        ("inference, 8-bit paged cache", "推理，8 位分页缓存"),
        {"dtype": "bf16", "optimizer": "none", "kv_dtype": "int8", "kv_block": 16},
        ("KV cache",),
        (
            "A byte a number and an fp32 scale for each token and head; a row takes whole blocks of b tokens.",
            "每个数一个字节，每个 token 和头一个 fp32 比例；每行占用整块，每块 b 个 token。",
        ),
        ("arXiv:2309.06180",),
    ),
    *(
        Entry(
            (f"ZeRO-{stage}, {RANKS} ranks", f"ZeRO-{stage}，{RANKS} 个进程"),
            {"dtype": "bf16", "zero": stage, "ranks": RANKS},
            (*STATES, "gathered parameters") if stage == 3 else STATES,
            why,
            (ZERO,),
        )
        for stage, why in (
            (
                1,
                (
                    "The ranks share out the optimizer states: 4 + 12/W bytes a parameter instead of 16.",
                    "各进程分担优化器状态：每个参数 4 + 12/W 字节，而不是 16。",
                ),
            ),
            (
                2,
                (
                    "And the gradients, each reduced to the rank that owns it: 2 + 14/W bytes.",
                    "再分担梯度，每个梯度归约到拥有它的进程：2 + 14/W 字节。",
                ),
            ),
            (
                3,
                (
                    "And the parameters: 16/W bytes, and for a while those of what is computed now and fetched ahead, "
                    "two blocks or the table.",
                    "再分担参数：16/W 字节；正在计算和预取的参数会短暂完整存在：两个块，或词表。",
                ),
            ),
        )
    ),
    Entry(
        ("DPO", "DPO"),
        {"dtype": "bf16", "algorithm": "dpo"},
        (*STATES, "reference model"),
        (
            "The trained policy with its states, and the frozen reference: 16 + 2 bytes a parameter in 16 bits. With "
            "LoRA the policy without its adapters is the reference.",
            "带训练状态的策略，加上冻结的参考模型：16 位下每个参数 16 + 2 字节。用 LoRA 时，"
            "去掉 adapter 的策略就是参考模型。",
        ),
        ("arXiv:2305.18290",),
    ),
    Entry(
        ("GRPO", "GRPO"),
        {"dtype": "bf16", "algorithm": "grpo"},
        (*STATES, "reference model"),
        (
            "As DPO: the group's mean reward replaces the value model, and a rule the reward model. The "
            "samples' "
            "KV cache comes on top while they are drawn.",
            "与 DPO 相同：组内平均奖励代替价值模型，规则代替奖励模型。采样时另有 KV cache。",
        ),
        ("arXiv:2402.03300",),
    ),
    Entry(
        ("PPO", "PPO"),
        {"dtype": "bf16", "algorithm": "ppo"},
        (*STATES, "reference model", "reward model", "value model"),
        (
            "Four models: the policy (16 bytes a parameter), the frozen reference and reward model (2 each), and a "
            "value model that is trained like the policy (16). A head of C numbers replaces the projection to the "
            "vocabulary in the last two.",
            "四个模型：策略（每个参数 16 字节），冻结的参考模型和奖励模型（各 2），"
            "以及与策略同样训练的价值模型（16）。后两者用 C 个数的"
            "输出头代替到词表的投影。",
        ),
        ("arXiv:2203.02155",),
    ),
)
