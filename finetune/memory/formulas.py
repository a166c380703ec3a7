"""What a language model needs in memory, from its shape alone: integer bytes, no torch, nothing allocated.

Each formula is printed beside its value and can be evaluated with `symbols`, which says what the letters mean.
Everything is of one rank.

Activations follow the method of Korthikanti et al. 2022 (arXiv:2205.05198, §4: add up what each operation keeps for its
backward pass) applied to the operations of this project, which keep less than theirs: norms keep their input and one
or two fp32 numbers a row, attention its q, k, v, output and two numbers a row and head instead of T×T matrices, and
there is no dropout mask. A tensor that two operations keep is counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import UserError

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Constants of csrc/bindings/linear_cross_entropy.cpp, see `loss_plan`.
LOGIT_BYTES, LEAST_ROWS, TASKS, LEAST_TILE, LEAST_BLOCK = 24 << 20, 64, 32, 256, 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama or GPT-2, see `shape_of`."""

    family: Literal["llama", "gpt"]
    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    max_length: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.family == "gpt":
            return {
                "qkv": (self.dim, 3 * self.dim),
                "o": (self.dim, self.dim),
                "up": (self.dim, self.hidden),
                "down": (self.hidden, self.dim),
            }
        return {
            "q": (self.dim, q),
            "k": (self.dim, kv),
            "v": (self.dim, kv),
            "o": (q, self.dim),
            "gate": (self.dim, self.hidden),
            "up": (self.dim, self.hidden),
            "down": (self.hidden, self.dim),
        }


def shape_of(config: Any) -> Shape:
    """Shape of a LlamaConfig or GPTConfig, or of a dict with their fields (finetune/lm/presets.py)."""
    get: Callable[..., Any] = (
        config.get if isinstance(config, dict) else lambda key, default=None: getattr(config, key, default)
    )
    llama = get("rope_theta") is not None
    dim, heads = get("dim"), get("heads")
    return Shape(
        family="llama" if llama else "gpt",
        vocab=get("vocab_size"),
        dim=dim,
        layers=get("layers"),
        heads=heads,
        kv_heads=get("kv_heads") or heads,
        head_dim=get("head_dim") or dim // heads,
        hidden=get("hidden") or 4 * dim,
        max_length=get("max_length") or (2048 if llama else 1024),
        tied=True if not llama else bool(get("tied", True)),
    )


@dataclass(frozen=True)
class Setup:
    """What is done with the model. `optimizer="none"` is inference: no gradients, a cache of batch · seq tokens."""

    batch: int = 1  # rows of a micro-batch; a row of packed documents counts as one
    seq: int = 2048  # tokens of a row, padding included
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the parameters
    optimizer: Literal["adamw", "none"] = "adamw"  # none: inference
    master: bool = True  # the optimizer keeps parameters of 16 bits a second time, in fp32
    moments: Literal["fp32", "8bit"] = "fp32"  # of the optimizer; 8bit: a byte, and 4 bytes for 256 of them
    lora_rank: int = 0  # rank of LoRA adapters; 0: all parameters are trained
    lora_targets: str = "all"  # linear layers with an adapter, separated by commas
    adapter: Literal["lora", "dora", "pissa"] = "lora"  # dora trains magnitudes too; pissa keeps where it started
    quantized: Literal["none", "nf4", "nf4_double", "int8"] = "none"  # form of frozen linear layers
    prompt: int = 0  # prompt tuning: so many vectors before the rows are all that is trained; seq counts them in
    prefix: int = 0  # prefix tuning: so many keys and values before the rows, in each layer, are all that is trained
    checkpointing: bool = False  # keep only the blocks' inputs and compute the rest again
    attention: Literal["flash", "naive"] = "flash"  # naive: ops.attention's reference, which makes T×T matrices
    loss: Literal["chunked", "full"] = "chunked"  # ops.linear_cross_entropy, or cross entropy of all logits
    zero: int = 0  # ZeRO stage: the ranks share out optimizer states (1), gradients too (2), parameters too (3)
    ranks: int = 1  # data-parallel ranks, each with its own batch
    algorithm: Literal["sft", "dpo", "grpo", "ppo"] = "sft"  # how many models are in memory beside the trained policy
    kv_dtype: Literal["same", "int8", "fp8"] = "same"  # of the cache; 8 bits: an fp32 scale a token and KV head too
    kv_block: int = 1  # tokens of a block of a paged cache: a row occupies whole ones

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("seq", 1), ("lora_rank", 0), ("prompt", 0), ("prefix", 0), ("ranks", 1),
                            ("zero", 0), ("kv_block", 1)):  # fmt: skip
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)} is too small: it must be at least {least}")
        if self.zero > 3:
            raise UserError(f"--zero {self.zero}: the stages are 0, 1, 2 and 3")
        if sum(map(bool, (self.lora_rank, self.prompt, self.prefix))) > 1:
            raise UserError("--lora-rank, --prompt and --prefix: only one of them can be trained")
        if self.quantized != "none" and self.training and not self.frozen:
            raise UserError(f"--quantized {self.quantized}: such weights cannot be trained; give a --lora-rank")
        if self.quantized != "none" and self.zero > 2:
            raise UserError(f"--quantized {self.quantized}: ZeRO-3 has no formula for such weights")

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def element(self) -> int:
        return BYTES[self.dtype]

    @property
    def training(self) -> bool:
        return self.optimizer != "none"

    @property
    def frozen(self) -> bool:
        """Are the model's own parameters frozen, and something beside them trained?"""
        return self.training and bool(self.lora_rank or self.prompt or self.prefix)

    def share(self, count: int, stage: int) -> int:
        """What one rank holds of `count` numbers that ZeRO shares out from this stage on: 1 / ranks, rounded up."""
        return -(-count // self.ranks) if self.zero >= stage else count

    def targets(self, shape: Shape) -> tuple[str, ...]:
        """The linear layers with an adapter; () without LoRA."""
        if not self.lora_rank or not self.training:
            return ()
        names = tuple(shape.linears) if self.lora_targets == "all" else tuple(self.lora_targets.split(","))
        for name in names:
            if name not in shape.linears:
                known = ", ".join(shape.linears)
                raise UserError(f"--lora-targets: a {shape.family} has no linear layer {name!r}; it has {known}")
        return names


@dataclass(frozen=True)
class Term:
    """One row of the table. `formula` gives `bytes` from the symbols of the module's text."""

    name: str
    bytes: int
    formula: str
    source: str


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
    "I": ("weights of a block's linear layers", "每个块的线性层的权重数"),
    "A": ("virtual tokens that are trained", "可训练的虚拟 token 数"),
    "X": ("blocks of 64 weights in a block's linear layers", "每个块的线性层中每 64 个权重一组的组数"),
    "Y": ("absmax of 256 blocks of 64, and a mean a layer", "每 256 组一个的最大值，以及每层一个均值"),
    "Z": ("rows of a block's linear layers", "每个块的线性层的行数"),
    "W": ("ranks", "进程数"),
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
    """The values of the letters, as `MEANING` explains them."""
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
        "I": linear_weights(shape),
        "A": setup.prompt or setup.prefix,
        "X": sum(-(-a * b // 64) for a, b in shape.linears.values()),
        "Y": sum(-(-a * b // (64 * 256)) + 1 for a, b in shape.linears.values()),
        "Z": sum(out for _, out in shape.linears.values()),
        "W": setup.ranks,
        "Q": quantized_blocks(shape, setup),
        "S": chunk,
        "J": tiles * chunk,
        "U": blocks,
        "G": whole_at_once(shape),
        "b": setup.kv_block,
    }


# ---- what stays -----------------------------------------------------------------------------------------------------


def parameters(shape: Shape) -> int:
    """Number of parameters. Llama: V·C [twice if untied] + L·(2C + 2·C·H·D + 2·C·K·D + 3·C·F) + C;
    GPT-2: (V + max_length)·C + L·(4C + 4C² + 4C + 2·C·F + F + C) + 2C, biases included (Radford et al. 2019).
    From the layers of finetune/lm/llama.py and finetune/lm/gpt.py."""
    linears = sum(a * b for a, b in shape.linears.values())
    if shape.family == "gpt":
        biases = sum(out for _, out in shape.linears.values())
        block = linears + biases + 4 * shape.dim
        return (shape.vocab + shape.max_length) * shape.dim + shape.layers * block + 2 * shape.dim
    embeddings = shape.vocab * shape.dim * (1 if shape.tied else 2)
    return embeddings + shape.layers * (linears + 2 * shape.dim) + shape.dim


def adapter_parameters(shape: Shape, rank: int, targets: Iterable[str]) -> int:
    """L · Σ r·(in + out) over the linear layers with an adapter (Hu et al. 2021, arXiv:2106.09685, §4.1: W + B·A)."""
    return shape.layers * sum(rank * sum(shape.linears[name]) for name in targets)


def block_adapters(shape: Shape, setup: Setup) -> int:
    """Trained by a block's adapters; DoRA adds a magnitude for each output (Liu et al. 2024, arXiv:2402.09353)."""
    count = adapter_parameters(shape, setup.lora_rank, setup.targets(shape)) // shape.layers
    return count + (outputs(shape, setup) if setup.adapter == "dora" else 0)


def outputs(shape: Shape, setup: Setup) -> int:
    return sum(shape.linears[name][1] for name in setup.targets(shape))


def linear_weights(shape: Shape) -> int:
    return sum(a * b for a, b in shape.linears.values())


# Bytes of a block's linear layers in few bits (peft/quantize.py): codes of 4 bits and the absmax of 64 weights, or
# that again as codes of 8 bits with an absmax for 256 and a mean a layer (Dettmers et al. 2023, arXiv:2305.14314,
# §3); codes of 8 bits and the absmax of a row (Dettmers et al. 2022, arXiv:2208.07339).
QUANTIZED = {"nf4": "I/2 + X·4", "nf4_double": "I/2 + X + Y·4", "int8": "I + Z·4"}


def quantized_bytes(shape: Shape, setup: Setup) -> int:
    value = symbols(shape, setup)
    if setup.quantized == "int8":
        return value["I"] + 4 * value["Z"]
    codes = sum(-(-a * b // 2) for a, b in shape.linears.values())
    return codes + (4 * value["X"] if setup.quantized == "nf4" else value["X"] + 4 * value["Y"])


def weights(shape: Shape, setup: Setup) -> Term:
    """Parameters in their dtype, or the linear layers in few bits; adapters beside them are fp32 whatever the dtype
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
    return Term("weights", base + adapters, text, f"layers of finetune/{shape.family}.py")


def shared_text(setup: Setup, stage: int) -> str:
    """The number of trained parameters that a rank holds the states of, as a formula."""
    text = "L·R" if setup.lora_rank else "A·C" if setup.prompt else "2·L·A·K·D" if setup.prefix else "P"
    return f"⌈{text}/W⌉" if setup.zero >= stage else text


def trained(shape: Shape, setup: Setup) -> tuple[int, int]:
    """(number of trained parameters, bytes of one)."""
    if not setup.training:
        return 0, setup.element
    if setup.lora_rank:
        return shape.layers * block_adapters(shape, setup), 4
    if setup.prompt:
        return setup.prompt * shape.dim, 4
    if setup.prefix:
        return setup.prefix * 2 * shape.layers * shape.kv_heads * shape.head_dim, 4
    return parameters(shape), setup.element


def trained_tensors(shape: Shape, setup: Setup) -> list[tuple[int, int]]:
    """(number of tensors, elements of each) of what is trained: tensor by tensor what `trained` counts."""
    if not setup.training:
        return []
    rank, layers, c = setup.lora_rank, shape.layers, shape.dim
    if rank:
        sizes = [shape.linears[name] for name in setup.targets(shape)]
        magnitudes = [(layers, out) for _, out in sizes] if setup.adapter == "dora" else []
        return [(layers, rank * width) for pair in sizes for width in pair] + magnitudes
    if setup.frozen:
        return [(1, trained(shape, setup)[0])]
    linears = [(layers, a * b) for a, b in shape.linears.values()]
    table = (1 if shape.tied else 2, shape.vocab * c)
    if shape.family == "gpt":
        biases = [(layers, out) for _, out in shape.linears.values()]
        return [table, (1, shape.max_length * c), *linears, *biases, (4 * layers + 2, c)]
    return [table, *linears, (2 * layers + 1, c)]


def quantized_blocks(shape: Shape, setup: Setup) -> int:
    """Blocks of 256 elements of the trained tensors, each of which begins one of its own."""
    return sum(count * -(-size // 256) for count, size in trained_tensors(shape, setup))


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
    """ZeRO-3's other need: the full parameters of what is computed now and of what is fetched ahead, two blocks or the
    table (Rajbhandari et al. 2020, §5.3; Zhao et al. 2023, arXiv:2304.11277, §3)."""
    if setup.zero < 3 or setup.ranks == 1:
        return Term("gathered parameters", 0, "0", "")
    size = whole_at_once(shape) * setup.element
    return Term("gathered parameters", size, "G·e", "ZeRO-3: two blocks, or the table, whole for a while")


def whole_at_once(shape: Shape) -> int:
    block = (parameters(shape) - rest(shape)) // shape.layers
    return max(2 * block, shape.vocab * shape.dim)


def rest(shape: Shape) -> int:
    """Parameters outside of the blocks: tables and the last norm."""
    if shape.family == "gpt":
        return (shape.vocab + shape.max_length) * shape.dim + 2 * shape.dim
    return shape.vocab * shape.dim * (1 if shape.tied else 2) + shape.dim


# ---- the other models of an algorithm --------------------------------------------------------------------------------


def companions(shape: Shape, setup: Setup) -> list[Term]:
    """The models beside the trained policy, of the policy's shape. In reward and value model a head of C numbers
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


# ---- what one forward keeps for its backward ------------------------------------------------------------------------


def block_saved(shape: Shape, setup: Setup, first: bool = False) -> dict[str, tuple[int, str]]:
    """What one block keeps of a token for its backward pass: what → (bytes, formula).

    Frozen linear layers keep nothing (their dx needs the weight alone); one that is trained, or has an adapter, keeps
    its input; an adapter also the r numbers between A and B, and its input in fp32 where activations are bf16; DoRA
    each output before it is scaled. The `first` block of a LoRA model has an input without gradient: nothing before its
    first adapter is kept, and with a prefix nothing before its keys.
    """
    e, c, f, heads, kv = setup.element, shape.dim, shape.hidden, shape.heads, shape.kv_heads
    llama, linears, targets = shape.family == "llama", shape.linears, setup.targets(shape)
    active = targets if setup.frozen else tuple(linears)  # linear layers with something to train
    norm = 4 if llama else 8  # 1/rms; or mean and 1/std: fp32
    saved: dict[str, tuple[int, str]] = {}

    def any_of(*names: str) -> bool:
        return any(name in active for name in names)

    flowing = not (first and setup.frozen and not setup.prompt)  # does a gradient flow through here?
    if flowing:
        saved["norm 1: input, statistics"] = c * e + norm, f"C·e + {norm}"
    if any_of("q", "k", "v", "qkv"):
        saved["q, k, v: input"] = c * e, "C·e"
        flowing = True
    flowing = flowing or bool(setup.prefix)
    if flowing and setup.attention == "flash":
        saved["attention: q, k, v"] = (heads + 2 * kv) * shape.head_dim * e, "(H + 2·K)·D·e"
        saved["attention: maxima, sums"] = 8 * heads, "8·H"
    elif flowing:  # the reference widens all three to fp32 and k, v to all heads
        saved["attention: q, k, v"] = 12 * heads * shape.head_dim, "12·H·D"
        saved["attention: T×T probabilities, twice; masks"] = (8 * heads + 1) * setup.seq + 1, "(8·H + 1)·T + 1"
    if any_of("o") or (flowing and setup.attention == "flash"):
        saved["attention: output"] = heads * shape.head_dim * e, "H·D·e"
    flowing = flowing or any_of("o")
    if flowing:
        saved["norm 2: input, statistics"] = c * e + norm, f"C·e + {norm}"
    if any_of("gate", "up"):
        saved["MLP: input"] = c * e, "C·e"
        flowing = True
    if flowing:
        inner = 2 if llama else 1
        saved["MLP: before the non-linearity"] = inner * f * e, f"{inner}·F·e"
    if any_of("down"):
        saved["down: input"] = f * e, "F·e"
    if targets:
        saved["adapters: x·Aᵀ"] = 4 * setup.lora_rank * len(targets), f"{4 * len(targets)}·r"
        if setup.adapter == "dora":
            saved["DoRA: outputs unscaled"] = outputs(shape, setup) * e, "O·e"
    return saved


def block(shape: Shape, setup: Setup, first: bool = False) -> Term:
    saved = block_saved(shape, setup, first).values()
    text = f"N·({' + '.join(text for _, text in saved)})"
    return Term("activations of a block", setup.tokens * sum(size for size, _ in saved), text, "")


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
    """What lies between a forward and its backward pass.

    Without checkpointing what L blocks keep; with it (Chen et al. 2016, arXiv:1604.06174) the input of each. Then the
    last norm's input and statistics, the loss's input, and positions, targets and (if its table is trained) the
    embedding's tokens, 8 bytes each.
    """
    if not setup.training:
        return Term("activations", 0, "0", "inference keeps nothing")
    n, width, norm = setup.tokens, shape.dim * setup.element, 4 if shape.family == "llama" else 8
    if setup.checkpointing:
        blocks, text = shape.layers * n * width, "N·L·C·e"
    else:
        each, first = block(shape, setup), block(shape, setup, first=True)
        blocks = (shape.layers - 1) * each.bytes + first.bytes
        text = f"L·{each.formula}" if each == first else f"(L - 1)·{each.formula} + {first.formula}"
    integers = 16 if setup.frozen else 24
    total, text = blocks + n * (2 * width + norm + integers), f"{text} + N·(2·C·e + {norm + integers})"
    if setup.adapter == "dora" and setup.lora_rank:  # the factors of the outputs, and the norms in them
        total, text = total + shape.layers * 8 * outputs(shape, setup), f"{text} + L·O·8"
    if setup.prefix:  # each row's copy, beside its own keys and values
        size = setup.batch * setup.prefix * 2 * shape.kv_heads * shape.head_dim * setup.element
        total, text = total + shape.layers * size, f"{text} + L·B·A·2·K·D·e"
    return Term("activations", total, text, "what each op saves, once a tensor")


# ---- what passes ----------------------------------------------------------------------------------------------------


def loss_plan(shape: Shape, setup: Setup) -> tuple[int, int, int]:
    """(rows of a chunk, tiles of the vocabulary, blocks of rows) of ops.linear_cross_entropy, for products in fp32: the
    arithmetic and the constants of `Plan` in csrc/bindings/linear_cross_entropy.cpp."""
    most = max(LEAST_ROWS, LOGIT_BYTES // (4 * shape.vocab))
    chunk = -(-setup.tokens // -(-setup.tokens // most))
    tiles = -(-shape.vocab // max(LEAST_TILE, -(-shape.vocab // TASKS)))
    block = max(LEAST_BLOCK, -(-chunk // max(TASKS // tiles, 1)))
    return chunk, tiles, -(-chunk // block)


def logits(shape: Shape, setup: Setup) -> Term:
    """What the loss needs beside its input. Chunked: a chunk of fp32 logits, each tile's part of the gradient of its
    input, maxima and sums, and the gradients that the forward pass makes: of all inputs, and of the head where it is
    trained (Hsu et al. 2024, arXiv:2410.10989). Full: log-probabilities, their gradient and the logits' gradient, N·V
    fp32 each. Inference: the last position's logits of each row."""
    n, e, c, v = setup.tokens, setup.element, shape.dim, shape.vocab
    if not setup.training:
        return Term("logits", setup.batch * v * 4, "B·V·4", "generate.py: the last position only")
    if setup.loss == "full":
        return Term("logits", 3 * n * v * 4, "3·N·V·4", "torch.nn.functional.cross_entropy")
    chunk, tiles, blocks = loss_plan(shape, setup)
    parts = tiles * chunk
    total, text = chunk * v * 4 + parts * (c * 4 + 12) + n * c * e, "S·V·4 + J·(C·4 + 12) + N·C·e"
    if e < 4:
        total, text = total + chunk * c * 4, text + " + S·C·4"
    if not setup.frozen:
        several = blocks > 1 or e < 4
        total, text = total + v * c * (e + 4 * blocks * several), text + " + V·C·" + ("(e + 4·U)" if several else "e")
    return Term("logits", total, text, f"ops.linear_cross_entropy, {chunk} tokens a chunk")


def step_growth(shape: Shape, setup: Setup) -> Term:
    """What a training step adds at its peak to weights and optimizer states: the largest of four moments.

    In the loss: all activations and the loss's own. In the last block's backward: the blocks' activations, the head's
    gradient, and gradients that pass through the MLP (of its output, of gate and up). In the first block's: its
    activations and nearly all gradients. At the end: all gradients; a tied table's comes in two parts until then, from
    the head and from the embedding. Between the last and the first block the sum changes evenly, so its ends suffice.
    """
    n, e, c, v = setup.tokens, setup.element, shape.dim, shape.vocab
    saved, all_gradients = activations(shape, setup).bytes, gradients(shape, setup).bytes
    head = 0 if setup.frozen else v * c * e
    table = head if shape.tied else 0
    passing = n * (c + (2 if shape.family == "llama" else 1) * shape.hidden) * e
    one = block(shape, setup).bytes
    again = one if setup.checkpointing else 0  # computed again
    inputs = n * 2 * c * e  # of the last norm and the loss: gone by then
    if setup.zero >= 2 and setup.ranks > 1:  # a block's gradients are whole until they are summed over the ranks
        passing += (parameters(shape) - rest(shape)) // shape.layers * e
    moments = {
        "in the loss: activations + logits": saved + logits(shape, setup).bytes,
        "in the last block's backward: activations + what passes": saved - inputs + again + head + passing,
        "in the first block's backward: gradients + what passes": all_gradients + one + passing,
        "at the backward's end: gradients": all_gradients + table,
    }
    text = max(moments, key=lambda moment: moments[moment])
    return Term("step growth", moments[text], text, "")


def predict(shape: Shape, setup: Setup) -> list[Term]:
    """The rows of the table for one setup; the last is the peak."""
    if not setup.training:
        terms = [weights(shape, setup), kv_cache(shape, setup), logits(shape, setup)]
        return [*terms, Term("peak", sum(t.bytes for t in terms), "sum", "")]
    kept = [weights(shape, setup), gradients(shape, setup), optimizer_states(shape, setup)]
    growth, whole, others = step_growth(shape, setup), gathered(shape, setup), companions(shape, setup)
    stay = [kept[0], kept[2], *others, *([whole] if whole.bytes else [])]
    names = " + ".join([term.name for term in stay] + [growth.name])
    peak = Term("peak", sum(term.bytes for term in stay) + growth.bytes, names, "")
    return [*kept, *stay[2:], activations(shape, setup), logits(shape, setup), growth, peak]
