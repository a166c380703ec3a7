"""Bytes that stay from step to step: weights, gradients, optimizer states, other models, KV cache."""

from __future__ import annotations

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
from finetune.memory.optimizers import LIKE, OPTIMIZERS
from finetune.memory.setup import BYTES, Setup, Shape, Term
from finetune.memory.whole import whole_parameters

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
    (finetune/peft/lora.py). PiSSA keeps the A and B that it started from, DoRA the squares of the rows of W, summed. A
    module that is trained whole next to adapters is a copy, and the base's stays (finetune/peft/whole.py)."""
    base = setup.share(parameters(shape), 3) * setup.element
    kept = {"lora": 1, "pissa": 2, "dora": 1}[setup.adapter] * block_adapters(shape, setup)
    kept += outputs(shape, setup) if setup.adapter == "dora" else 0
    head = {"lora": 1, "pissa": 2, "dora": 1}[setup.adapter] * head_adapter(shape, setup)
    head += shape.vocab if setup.adapter == "dora" and head else 0
    adapters = 4 * setup.share(shape.layers * kept + head, 3)
    text = f"({parameters_text(shape)})·e"
    if shared := setup.zero >= 3:
        text = "⌈P/W⌉·e"
    if setup.quantized != "none":
        base = (parameters(shape) - shape.layers * linear_weights(shape)) * setup.element
        base += shape.layers * quantized_bytes(shape, setup)
        text = f"(P - L·I)·e + L·({QUANTIZED[setup.quantized]})"
    if adapters:
        each = {"lora": "L·R", "pissa": "2·L·R", "dora": "L·(R + O)"}[setup.adapter]
        if head:
            each = f"({each} + {'2·' * (setup.adapter == 'pissa')}h{' + V' * (setup.adapter == 'dora')})"
        text += f" + ⌈{each}/W⌉·4" if shared else f" + {each}·4"
        if count := whole_parameters(shape, setup):
            base, text = base + count * setup.element, f"{text} + w·e"
    elif setup.frozen:
        base, text = base + 4 * setup.share(trained(shape, setup)[0], 3), f"{text} + {shared_text(setup, 3)}·4"
    term = Term("weights", base + adapters, text, f"layers of finetune/lm/{shape.family}.py")
    return term.on_host() if setup.offload == "parameters" else term


def parameters_text(shape: Shape) -> str:
    """The formula of `parameters`."""
    tables = {0: "", 1: "V·C + ", 2: "2·V·C + "}[shape.tables]
    if shape.family == "gpt":
        ends = ("M·C + " if shape.first else "", " + 2·C" if shape.last else "")
        return f"{tables}{ends[0]}L·(2·C·F + 4·C·H·D + F + 3·H·D + 6·C){ends[1]}"
    biases = ((shape.qkv_bias, "H·D + 2·K·D"), (shape.o_bias, "C"), (shape.mlp_bias, "2·F + C"))
    extra = [text for has, text in biases if has] + ["2·D"] * shape.qk_norm
    norms = "4·C" if shape.post_norms else "2·C"
    inner = " + ".join(["2·C·H·D", "2·C·K·D", "3·C·F", norms, *extra])
    return f"{tables}L·({inner})" + (" + C" if shape.last else "")


def shared_text(setup: Setup, stage: int) -> str:
    """The number of trained parameters (see `trained`) that a rank holds the states of, as a formula."""
    text = "L·R" if setup.lora_rank else "A·C" if setup.prompt else "2·L·A·K·D" if setup.prefix else "P"
    text = "(L·R + h)" if setup.adapts_head else text
    return f"⌈{text}/W⌉" if setup.zero >= stage else text


def gradients(shape: Shape, setup: Setup) -> Term:
    """One number of the parameter's dtype for each trained parameter (autograd: p.grad is like p); with another
    --grad-dtype in a buffer of that dtype, which stays from step to step (Megatron-LM's main_grad)."""
    count, element = trained(shape, setup)
    width = "4" if setup.frozen else "e"
    source = "p.grad is like p"
    if setup.buffers:
        element, width, source = setup.gradient, "g", "buffers that stay (Megatron-LM's main_grad)"
    size, text = setup.share(count, 2) * element, f"{shared_text(setup, 2)}·{width}"
    if copies := whole_parameters(shape, setup):
        size, text = size + copies * setup.element, f"{text} + w·e"
    term = Term("gradients", size, text, source)
    return term.on_host() if setup.offload != "none" and setup.training else term


def optimizer_states(shape: Shape, setup: Setup) -> Term:
    """What the optimizer keeps (finetune/memory/optimizers.py): AdamW two moments in fp32 (Loshchilov & Hutter 2019,
    arXiv:1711.05101, algorithm 2), in 8 bits 2 bytes a parameter instead of 8 and two fp32 maxima a block of 256
    (Dettmers et al. 2022, arXiv:2110.02861; ops.adamw8bit_), SGD a momentum or nothing, Muon a momentum for the
    matrices of the blocks and AdamW's moments for the rest (Jordan et al. 2024; divided by ZeRO as in Liu et al. 2025,
    arXiv:2502.16982, §2.3), Adafactor the sums of rows and columns (Shazeer & Stern 2018, arXiv:1804.04235, §3).
    Parameters of 16 bits have an fp32 master copy too (Micikevicius et al. 2018, arXiv:1710.03740, §3.1): AdamW's
    K = 12 bytes a parameter of ZeRO's accounting (Rajbhandari et al. 2020, arXiv:1910.02054, §3.1). The scratch of a
    step is not counted."""
    (count, element), copies = trained(shape, setup), whole_parameters(shape, setup)
    each, master = state_widths(setup, element)
    name = f"({shared_text(setup, 1).strip('()')} + w)" if copies else shared_text(setup, 1)
    counted = {
        "trained": (name, lambda: count + copies),
        "matrices": (shared(setup, "m"), lambda: trained_matrices(shape, setup)),
        "others": (shared(setup, "v"), lambda: count + copies - trained_matrices(shape, setup)),
        "factors": ("f", lambda: factors(shape, setup)),
        "blocks": (shared(setup, "Q"), lambda: quantized_blocks(shape, setup)),
    }
    size = sum(setup.share(counted[name][1](), 1) * width for name, width in each.items())
    text = " + ".join(f"{counted[name][0]}·{width}" for name, width in each.items()) or "0"
    if copies and setup.element < 4 and setup.master:  # adapters are fp32, modules that are trained whole may not be
        size, text, master = size + 4 * copies, f"{text} + w·4", True
    source = OPTIMIZERS[setup.optimizer].summary + ("; an fp32 master" if master else "")
    term = Term("optimizer states", size, text, source)
    return term.on_host() if setup.offload != "none" and setup.training else term


def state_widths(setup: Setup, element: int) -> tuple[dict[str, int], bool]:
    """(bytes of the optimizer's states by what they are counted in, whether a master is among them) of trained
    parameters of `element` bytes."""
    master = setup.training and element < 4 and setup.master
    like = 4 if master else element
    each = {name: like if width == LIKE else width for name, width in OPTIMIZERS[setup.optimizer].states}
    return ({"trained": 4 + each.pop("trained", 0)} | each, True) if master else (each, False)


def shared(setup: Setup, letter: str) -> str:
    return f"⌈{letter}/W⌉" if setup.zero >= 1 else letter


def gathered(shape: Shape, setup: Setup) -> Term:
    """Parameters that ZeRO-3 gathers whole, or that come from the host: those in use and those fetched ahead, two
    blocks or the table (Rajbhandari et al. 2020, §5.3; Zhao et al. 2023, arXiv:2304.11277, §3)."""
    if setup.zero < 3 and setup.offload != "parameters":
        return Term("gathered parameters", 0, "0", "")
    size = whole_at_once(shape) * setup.element
    return Term("gathered parameters", size, "G·e", "two blocks, or the table, whole for a while")


def companions(shape: Shape, setup: Setup) -> list[Term]:
    """The models next to the trained policy, of the policy's shape. In reward and value model a head of C numbers
    replaces the projection to the vocabulary (Ouyang et al. 2022, arXiv:2203.02155, §3.5, appendix C).

    dpo: a frozen reference (Rafailov et al. 2023, arXiv:2305.18290); grpo: the same, and no value model (Shao et al.
    2024, arXiv:2402.03300, §4.1; the reward is a rule); ppo: reference, frozen reward model, trained value model, so
    four in all. With LoRA the policy without its adapters is the reference, and costs nothing. rlhf: four adapters on
    the same weights, two of them with a head of C numbers (modules/post_train/alignment/rlhf/code/stages.py).
    """
    if setup.algorithm == "sft" or not setup.training:
        return []
    if setup.algorithm == "rlhf":
        return adapted_companions(shape, setup)
    terms = []
    if not setup.frozen:
        text = "⌈P/W⌉·e" if setup.zero >= 3 else "P·e"
        size = setup.share(parameters(shape), 3) * setup.element
        reference = Term("reference model", size, text, "frozen weights")
        terms.append(reference.on_host() if setup.offload == "parameters" else reference)
    if setup.algorithm == "ppo":
        head = shape.dim - (0 if shape.tied else shape.vocab * shape.dim)
        count = parameters(shape) + head
        plain = "P + C" if shape.tied else "P + C - V·C"
        shared = {stage: f"⌈({plain})/W⌉" if setup.zero >= stage else f"({plain})" for stage in (1, 2, 3)}
        terms.append(Term("reward model", setup.share(count, 3) * setup.element, f"{shared[3]}·e", "frozen weights"))
        kept = state_widths(setup, setup.element)[0].get("trained", 0)
        size = setup.share(count, 3) * setup.element + setup.share(count, 2) * setup.gradient
        size += setup.share(count, 1) * kept
        width = "g" if setup.buffers else "e"
        text = f"{shared[3]}·e + {shared[2]}·{width} + {shared[1]}·{kept}"
        terms.append(Term("value model", size, text, "weights, gradients and optimizer states"))
    return terms


def adapted_companions(shape: Shape, setup: Setup) -> list[Term]:
    """Reference, reward and value model as adapters on the policy's weights, in fp32."""
    count, head = trained(shape, setup)[0], shape.dim
    text = "(L·R + h)" if setup.adapts_head else "L·R"
    kept = state_widths(setup, 4)[0].get("trained", 0)
    return [
        Term("reference model", 4 * count, f"{text}·4", "frozen adapter"),
        Term("reward model", 4 * (count + head), f"({text} + C)·4", "frozen adapter and head"),
        Term(
            "value model", (8 + kept) * (count + head), f"({text} + C)·(4 + 4 + {kept})",
            "adapter and head, gradients and optimizer states",
        ),
    ]  # fmt: skip


def kv_cache(shape: Shape, setup: Setup) -> Term:
    """2 (keys, values) · L · K · D · e a token: with grouped queries the KV heads count, not the query heads
    (Ainslie et al. 2023, arXiv:2305.13245); lm/cache.py, KVCache. A paged one (ops.kv_cache) rounds a row up
    to whole blocks, and in 8 bits has D + 4 bytes for D · e."""
    if setup.kv_dtype in ("int8", "fp8"):
        head, each = shape.head_dim + 4, "2·L·K·(D + 4)"
    elif setup.kv_dtype in ("same", setup.dtype):
        head, each = shape.head_dim * setup.element, "2·L·K·D·e"
    else:
        head, each = shape.head_dim * BYTES[setup.kv_dtype], f"2·L·K·D·{BYTES[setup.kv_dtype]}"
    tokens = setup.batch * -(-setup.seq // setup.kv_block) * setup.kv_block
    text = each + ("·N" if setup.kv_block == 1 else "·B·⌈T/b⌉·b")
    own = setup.kv_block == 1 and each.endswith("·e")
    source = "KVCache of finetune/lm/cache.py" if own else "pools of ops.kv_cache"
    if shape.window_layers:
        source += "; all tokens, in layers with a window too"
    return Term("KV cache", 2 * shape.layers * shape.kv_heads * head * tokens, text, source)
