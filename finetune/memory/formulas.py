"""What a language model needs in memory, from its shape alone: integer bytes, no torch, nothing allocated.

Each formula is printed beside its value and can be evaluated with `symbols`: N = B·T tokens of B rows, C width (`dim`),
F hidden width of the MLP, H query heads, K key–value heads, D head size, V vocabulary, M maximum length, L layers,
P parameters, r LoRA rank, R adapter parameters of a block = Σ r·(in + out), e bytes of a number (fp32 4, bf16 2).

Activations follow the method of Korthikanti et al. 2022 (arXiv:2205.05198, §4: add up what each operation keeps for its
backward pass) applied to the operations of this project, which keep less than theirs: norms keep their input and one
or two fp32 numbers a row, attention its q, k, v, output and one log-sum-exp a row instead of matrices of T×T, and there
is no dropout mask. A tensor that two operations keep is counted once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

BYTES = {"fp32": 4, "bf16": 2}
LLAMA_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
GPT_LINEARS = ("qkv", "o", "up", "down")
# The logits buffer of ops.linear_cross_entropy: constants of csrc/bindings/linear_cross_entropy.cpp.
LOGIT_BYTES, LEAST_ROWS, TILE_BYTES = 24 << 20, 64, 8 << 20


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
    """Shape of a LlamaConfig or GPTConfig, or of a dict with their fields (finetune/shapes.py)."""
    get = config.get if isinstance(config, dict) else lambda key, default=None: getattr(config, key, default)
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

    batch: int = 1  # rows of one micro-batch; packed rows count as one
    seq: int = 2048  # tokens of a row, padding included
    dtype: str = "fp32"  # of the parameters: fp32, bf16
    optimizer: str = "adamw"  # adamw, none
    lora_rank: int = 0  # 0: all parameters are trained
    lora_targets: tuple[str, ...] = ()  # linear layers with an adapter; () = all
    checkpointing: bool = False  # keep the blocks' inputs only
    attention: str = "flash"  # flash, naive
    loss: str = "chunked"  # chunked (ops.linear_cross_entropy), full (all logits, torch's cross entropy)

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def element(self) -> int:
        return BYTES[self.dtype]

    @property
    def training(self) -> bool:
        return self.optimizer != "none"

    def targets(self, shape: Shape) -> tuple[str, ...]:
        """The linear layers with an adapter; () without LoRA."""
        return (self.lora_targets or tuple(shape.linears)) if self.lora_rank else ()


@dataclass(frozen=True)
class Term:
    """One row of the table. `formula` gives `bytes` from the symbols of the module's text."""

    name: str
    bytes: int
    formula: str
    source: str


def symbols(shape: Shape, setup: Setup) -> dict[str, int]:
    """The values of the letters in the formulas."""
    return {
        **{"N": setup.tokens, "B": setup.batch, "T": setup.seq, "L": shape.layers, "C": shape.dim, "F": shape.hidden},
        **{"H": shape.heads, "K": shape.kv_heads, "D": shape.head_dim, "V": shape.vocab, "M": shape.max_length},
        **{"P": parameters(shape), "e": setup.element, "r": setup.lora_rank},
        "R": adapter_parameters(shape, setup.lora_rank, setup.targets(shape)) // shape.layers,
    }


# ---- what stays -----------------------------------------------------------------------------------------------------


def parameters(shape: Shape) -> int:
    """Number of parameters. Llama: V·C [twice if untied] + L·(2C + 2·C·H·D + 2·C·K·D + 3·C·F) + C;
    GPT-2: (V + max_length)·C + L·(4C + 4C² + 4C + 2·C·F + F + C) + 2C, biases included (Radford et al. 2019).
    From the layers of finetune/llama.py and finetune/gpt.py."""
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


def weights(shape: Shape, setup: Setup) -> Term:
    """Parameters in their dtype; LoRA adapters beside them are fp32 whatever the dtype (finetune/lora.py)."""
    base = parameters(shape) * setup.element
    adapters = 4 * adapter_parameters(shape, setup.lora_rank, setup.targets(shape))
    if shape.family == "gpt":
        text = "((V + M)·C + L·(2·C·F + 4·C·C + F + 9·C) + 2·C)·e"
    else:
        text = ("V·C" if shape.tied else "2·V·C") + " + L·(2·C·H·D + 2·C·K·D + 3·C·F + 2·C) + C"
        text = f"({text})·e"
    if adapters:
        text += " + L·R·4"
    return Term("weights", base + adapters, text, f"layers of finetune/{shape.family}.py")


def trained(shape: Shape, setup: Setup) -> tuple[int, int]:
    """(number of trained parameters, bytes of one)."""
    if not setup.training:
        return 0, setup.element
    if setup.lora_rank:
        return adapter_parameters(shape, setup.lora_rank, setup.targets(shape)), 4
    return parameters(shape), setup.element


def gradients(shape: Shape, setup: Setup) -> Term:
    """One number of the parameter's dtype for each trained parameter (autograd: p.grad is like p)."""
    count, element = trained(shape, setup)
    text = "L·R·4" if setup.lora_rank else "P·e"
    return Term("gradients", count * element, text, "p.grad is like p")


def optimizer_states(shape: Shape, setup: Setup) -> Term:
    """AdamW's two moments in fp32 (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2); bf16 parameters have an fp32
    master copy too (Micikevicius et al. 2018, arXiv:1710.03740, §3.1): K = 12 bytes a parameter of ZeRO's accounting
    (Rajbhandari et al. 2020, arXiv:1910.02054, §3.1)."""
    count, element = trained(shape, setup)
    copies = 2 + (element < 4)
    text = ("L·R" if setup.lora_rank else "P") + f"·{4 * copies}"
    return Term("optimizer states", count * 4 * copies, text, "AdamW: two fp32 moments; bf16 adds an fp32 master")


def kv_cache(shape: Shape, setup: Setup) -> Term:
    """2 (keys, values) · L · K · D · e a token: with grouped queries the KV heads count, not the query heads
    (Ainslie et al. 2023, arXiv:2305.13245); finetune/generate.py, KVCache."""
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * setup.element
    return Term("KV cache", per_token * setup.tokens, "2·L·K·D·e·N", "KVCache of finetune/generate.py")


# ---- what one forward keeps for its backward ------------------------------------------------------------------------


def block_saved(shape: Shape, setup: Setup, first: bool = False) -> dict[str, tuple[int, str]]:
    """What one block keeps of a token for its backward pass: what → (bytes, formula).

    Frozen linear layers keep nothing (their dx needs the weight alone); one that is trained, or has an adapter, keeps
    its input; an adapter also the r numbers between A and B, and its input in fp32 where activations are bf16. The
    `first` block of a LoRA model has an input without gradient: nothing before its first adapter is kept.
    """
    e, c, f, heads, kv = setup.element, shape.dim, shape.hidden, shape.heads, shape.kv_heads
    llama, linears, targets = shape.family == "llama", shape.linears, setup.targets(shape)
    active = targets or tuple(linears)  # linear layers with something to train
    norm = 4 if llama else 8  # 1/rms; or mean and 1/std: fp32
    saved: dict[str, tuple[int, str]] = {}

    def any_of(*names: str) -> bool:
        return any(name in active for name in names)

    flowing = not (first and targets)  # does a gradient flow through here?
    if flowing:
        saved["norm 1: input, statistics"] = c * e + norm, f"C·e + {norm}"
    if any_of("q", "k", "v", "qkv"):
        saved["q, k, v: input"] = c * e, "C·e"
        flowing = True
    if flowing:
        saved["attention: q, k, v"] = (heads + 2 * kv) * shape.head_dim * e, "(H + 2·K)·D·e"
        if setup.attention == "flash":
            saved["attention: log-sum-exp"] = 4 * heads, "4·H"
        else:
            saved["attention: probabilities"] = heads * setup.seq * e, "H·T·e"
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
    return saved


def block_total(shape: Shape, setup: Setup, first: bool = False) -> int:
    return setup.tokens * sum(size for size, _ in block_saved(shape, setup, first).values())


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
        blocks = (shape.layers - 1) * block_total(shape, setup) + block_total(shape, setup, first=True)
        each, first = (
            " + ".join(text for _, text in block_saved(shape, setup, first).values()) for first in (False, True)
        )
        text = f"N·L·({each})" if each == first else f"N·(L - 1)·({each}) + N·({first})"
    integers = 16 if setup.lora_rank else 24
    total = blocks + n * (2 * width + norm + integers)
    return Term("activations", total, f"{text} + N·(2·C·e + {norm + integers})", "what each op saves, once a tensor")


# ---- what passes ----------------------------------------------------------------------------------------------------


def chunk_rows(shape: Shape, setup: Setup) -> int:
    """Tokens whose logits exist at once in ops.linear_cross_entropy: at most LOGIT_BYTES, but LEAST_ROWS rows."""
    fit = max(LEAST_ROWS, LOGIT_BYTES // (4 * shape.vocab))
    return -(-setup.tokens // -(-setup.tokens // fit))


def logits(shape: Shape, setup: Setup) -> Term:
    """What the loss needs beside its input. Chunked: one chunk of fp32 logits, then the gradients that it makes in the
    forward pass, of its input and (if trained) of the head (Hsu et al. 2024, arXiv:2410.10989; with bf16 the latter is
    summed in fp32). Full: log-probabilities, their gradient and the logits' gradient, N·V fp32 each.
    Inference: the last position's logits of each row, fp32."""
    n, e, c, v = setup.tokens, setup.element, shape.dim, shape.vocab
    if not setup.training:
        return Term("logits", setup.batch * v * 4, "B·V·4", "generate.py: the last position only")
    if setup.loss == "full":
        return Term("logits", 3 * n * v * 4, "3·N·V·4", "torch.nn.functional.cross_entropy")
    rows = chunk_rows(shape, setup)
    total, text = rows * v * 4 + n * c * e, f"{rows}·V·4 + N·C·e"
    if e < 4:
        tile = min(v, max(TILE_BYTES // 4 // c, LEAST_ROWS))
        total, text = total + (2 * rows + tile) * c * 4, f"{text} + {2 * rows + tile}·C·4"
    if not setup.lora_rank:
        head = e if e == 4 else e + 4
        total, text = total + v * c * head, f"{text} + V·C·{head}"
    return Term("logits", total, text, f"ops.linear_cross_entropy, {rows} tokens a chunk")


def step_growth(shape: Shape, setup: Setup) -> Term:
    """What a training step adds at its peak to weights and optimizer states: the larger of its two ends.

    Backward's start: all activations, what the loss holds on to, and the gradients that pass through the last block.
    Backward's end: all gradients; a tied table's comes in two parts, from the head and from the embedding.
    """
    n, e, c, v = setup.tokens, setup.element, shape.dim, shape.vocab
    passing = n * (2 * c + 2 * shape.hidden) * e  # of the MLP: of its output and input, of gate and up
    if setup.checkpointing:
        passing += block_total(shape, setup)  # computed again
    start = activations(shape, setup).bytes + max(logits(shape, setup).bytes, passing)
    end = gradients(shape, setup).bytes
    if not setup.lora_rank:
        end += v * c * e * shape.tied
    return Term("step growth", max(start, end), "", "the larger of both ends of the backward pass")


def predict(shape: Shape, setup: Setup) -> list[Term]:
    """The rows of the table for one setup; the last is the peak."""
    if not setup.training:
        terms = [weights(shape, setup), kv_cache(shape, setup), logits(shape, setup)]
        return [*terms, Term("peak", sum(t.bytes for t in terms), "sum", "")]
    kept = [weights(shape, setup), gradients(shape, setup), optimizer_states(shape, setup)]
    growth = step_growth(shape, setup)
    peak = Term("peak", kept[0].bytes + kept[2].bytes + growth.bytes, "weights + optimizer states + step growth", "")
    return [*kept, activations(shape, setup), logits(shape, setup), growth, peak]
