"""How many numbers a model has, and how many of them are trained: no bytes yet."""

from __future__ import annotations

from collections.abc import Iterable

from finetune.memory.setup import Setup, Shape


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
    """Of a block, like the next three."""
    return sum(a * b for a, b in shape.linears.values())


def blocks_of_64(shape: Shape) -> int:
    """Blocks of 64 weights with one absmax (NF4)."""
    return sum(-(-a * b // 64) for a, b in shape.linears.values())


def constants_of_blocks(shape: Shape) -> int:
    """Numbers in fp32 for absmax values that are themselves quantized: one for 256 of them, and a mean a layer."""
    return sum(-(-a * b // (64 * 256)) + 1 for a, b in shape.linears.values())


def output_rows(shape: Shape) -> int:
    """Rows of the weights, with one absmax each (int8)."""
    return sum(out for _, out in shape.linears.values())


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
    """(number of tensors, elements of each) of the trained tensors; together the count of `trained`."""
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
    """Blocks of 256 elements of the trained tensors, which begin a new block each."""
    return sum(count * -(-size // 256) for count, size in trained_tensors(shape, setup))


def whole_at_once(shape: Shape) -> int:
    block = (parameters(shape) - rest(shape)) // shape.layers
    return max(2 * block, shape.vocab * shape.dim)


def rest(shape: Shape) -> int:
    """Parameters outside of the blocks: tables and the last norm."""
    if shape.family == "gpt":
        return (shape.vocab + shape.max_length) * shape.dim + 2 * shape.dim
    return shape.vocab * shape.dim * (1 if shape.tied else 2) + shape.dim
