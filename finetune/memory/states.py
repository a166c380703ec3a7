"""Bytes that stay from step to step: weights, gradients, optimizer states, other models, KV cache."""

from __future__ import annotations

from finetune.memory.counts import (
    block_adapters,
    blocks_of_64,
    constants_of_blocks,
    linear_weights,
    output_rows,
    outputs,
    parameters,
    quantized_blocks,
    trained,
    whole_at_once,
)
from finetune.memory.setup import Setup, Shape, Term

# Bytes of a block's linear layers in few bits (peft/quantize.py): codes of 4 bits and the absmax of 64 weights, or
# that again as codes of 8 bits with an absmax for 256 and a mean a layer (Dettmers et al. 2023, arXiv:2305.14314,
# §3); codes of 8 bits and the absmax of a row (Dettmers et al. 2022, arXiv:2208.07339).
QUANTIZED = {"nf4": "I/2 + X·4", "nf4_double": "I/2 + X + Y·4", "int8": "I + Z·4"}


def quantized_bytes(shape: Shape, setup: Setup) -> int:
    if setup.quantized == "int8":
        return linear_weights(shape) + 4 * output_rows(shape)
    codes, blocks = sum(-(-a * b // 2) for a, b in shape.linears.values()), blocks_of_64(shape)
    return codes + (4 * blocks if setup.quantized == "nf4" else blocks + 4 * constants_of_blocks(shape))


def weights(shape: Shape, setup: Setup) -> Term:
    """Parameters in their dtype, or the linear layers in few bits; adapters are fp32 whatever the dtype
    (finetune/peft/lora.py). PiSSA keeps the A and B that it started from, DoRA the squares of the rows of W, summed."""
    base = setup.share(parameters(shape), 3) * setup.element
    kept = {"lora": 1, "pissa": 2, "dora": 1}[setup.adapter] * block_adapters(shape, setup)
    kept += outputs(shape, setup) if setup.adapter == "dora" else 0
    adapters = 4 * setup.share(shape.layers * kept, 3)
    if shape.family == "gpt":
        text = "((V + M)·C + L·(2·C·F + 4·C·C + F + 9·C) + 2·C)·e"
    else:
        text = ("V·C" if shape.tied else "2·V·C") + " + L·(2·C·H·D + 2·C·K·D + 3·C·F + 2·C) + C"
        text = f"({text})·e"
    if shared := setup.zero >= 3:
        text = "⌈P/W⌉·e"
    if setup.quantized != "none":
        base = (parameters(shape) - shape.layers * linear_weights(shape)) * setup.element
        base += shape.layers * quantized_bytes(shape, setup)
        text = f"(P - L·I)·e + L·({QUANTIZED[setup.quantized]})"
    if adapters:
        each = {"lora": "L·R", "pissa": "2·L·R", "dora": "L·(R + O)"}[setup.adapter]
        text += f" + ⌈{each}/W⌉·4" if shared else f" + {each}·4"
    elif setup.frozen:
        base, text = base + 4 * setup.share(trained(shape, setup)[0], 3), f"{text} + {shared_text(setup, 3)}·4"
    return Term("weights", base + adapters, text, f"layers of finetune/lm/{shape.family}.py")


def shared_text(setup: Setup, stage: int) -> str:
    """The number of trained parameters that a rank holds the states of, as a formula."""
    text = "L·R" if setup.lora_rank else "A·C" if setup.prompt else "2·L·A·K·D" if setup.prefix else "P"
    return f"⌈{text}/W⌉" if setup.zero >= stage else text


def gradients(shape: Shape, setup: Setup) -> Term:
    """One number of the parameter's dtype for each trained parameter (autograd: p.grad is like p)."""
    count, element = trained(shape, setup)
    text = f"{shared_text(setup, 2)}·{'4' if setup.frozen else 'e'}"
    return Term("gradients", setup.share(count, 2) * element, text, "p.grad is like p")


def optimizer_states(shape: Shape, setup: Setup) -> Term:
    """AdamW's two moments in fp32 (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2); 16-bit parameters have an
    fp32 master copy too (Micikevicius et al. 2018, arXiv:1710.03740, §3.1): K = 12 bytes a parameter of ZeRO's
    accounting (Rajbhandari et al. 2020, arXiv:1910.02054, §3.1). With 8-bit moments 2 bytes a parameter instead of 8,
    and two fp32 maxima a block of 256 (Dettmers et al. 2022, arXiv:2110.02861; ops.adamw8bit_)."""
    count, element = trained(shape, setup)
    master = 4 * (element < 4 and setup.master)
    if setup.moments == "8bit":
        blocks = setup.share(quantized_blocks(shape, setup), 1)
        text = f"{shared_text(setup, 1)}·{2 + master} + {'⌈Q/W⌉' if setup.zero >= 1 else 'Q'}·8"
        size = setup.share(count, 1) * (2 + master) + blocks * 8
        return Term("optimizer states", size, text, "AdamW: two 8-bit moments; 16 bits add an fp32 master")
    copies = 2 + master // 4
    text = f"{shared_text(setup, 1)}·{4 * copies}"
    source = "AdamW: two fp32 moments; 16 bits add an fp32 master"
    return Term("optimizer states", setup.share(count, 1) * 4 * copies, text, source)


def gathered(shape: Shape, setup: Setup) -> Term:
    """Parameters that ZeRO-3 gathers whole: those in use and those fetched ahead, two blocks or the
    table (Rajbhandari et al. 2020, §5.3; Zhao et al. 2023, arXiv:2304.11277, §3)."""
    if setup.zero < 3 or setup.ranks == 1:
        return Term("gathered parameters", 0, "0", "")
    size = whole_at_once(shape) * setup.element
    return Term("gathered parameters", size, "G·e", "ZeRO-3: two blocks, or the table, whole for a while")


def companions(shape: Shape, setup: Setup) -> list[Term]:
    """The models next to the trained policy, of the policy's shape. In reward and value model a head of C numbers
    replaces the projection to the vocabulary (Ouyang et al. 2022, arXiv:2203.02155, §3.5, appendix C).

    dpo: a frozen reference (Rafailov et al. 2023, arXiv:2305.18290); grpo: the same, and no value model (Shao et al.
    2024, arXiv:2402.03300, §4.1; the reward is a rule); ppo: reference, frozen reward model, trained value model, so
    four in all. With LoRA the policy without its adapters is the reference, and costs nothing.
    """
    if setup.algorithm == "sft" or not setup.training:
        return []
    terms = []
    if not setup.frozen:
        text = "⌈P/W⌉·e" if setup.zero >= 3 else "P·e"
        size = setup.share(parameters(shape), 3) * setup.element
        terms.append(Term("reference model", size, text, "frozen weights"))
    if setup.algorithm == "ppo":
        head = shape.dim - (0 if shape.tied else shape.vocab * shape.dim)
        count = parameters(shape) + head
        plain = "P + C" if shape.tied else "P + C - V·C"
        shared = {stage: f"⌈({plain})/W⌉" if setup.zero >= stage else f"({plain})" for stage in (1, 2, 3)}
        terms.append(Term("reward model", setup.share(count, 3) * setup.element, f"{shared[3]}·e", "frozen weights"))
        copies = 2 + (setup.element < 4 and setup.master)
        size = setup.share(count, 3) * setup.element + setup.share(count, 2) * setup.element
        size += setup.share(count, 1) * 4 * copies
        text = f"{shared[3]}·e + {shared[2]}·e + {shared[1]}·{4 * copies}"
        terms.append(Term("value model", size, text, "weights, gradients and optimizer states"))
    return terms


def kv_cache(shape: Shape, setup: Setup) -> Term:
    """2 (keys, values) · L · K · D · e a token: with grouped queries the KV heads count, not the query heads
    (Ainslie et al. 2023, arXiv:2305.13245); lm/generate.py, KVCache. A paged one (ops.kv_cache) rounds a row up
    to whole blocks, and in 8 bits has D + 4 bytes for D · e."""
    same, blocks = setup.kv_dtype == "same", -(-setup.seq // setup.kv_block)
    head = shape.head_dim * setup.element if same else shape.head_dim + 4
    tokens = setup.batch * blocks * setup.kv_block
    text = "2·L·K·D·e" if same else "2·L·K·(D + 4)"
    text += "·N" if setup.kv_block == 1 else "·B·⌈T/b⌉·b"
    source = "KVCache of finetune/lm/generate.py" if same and setup.kv_block == 1 else "pools of ops.kv_cache"
    return Term("KV cache", 2 * shape.layers * shape.kv_heads * head * tokens, text, source)
