"""How many numbers a model has, and how many of them are trained: no bytes yet."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from finetune.memory.setup import Setup, Shape
from finetune.memory.whole import Tensors, whole_tensors


def parameters(shape: Shape) -> int:
    """Number of parameters. Llama: V·C [twice if untied] + L·(2C + 2·C·H·D + 2·C·K·D + 3·C·F) + C, and in each block
    the biases, 2D of query and key norms, 2C of norms behind attention and MLP, where a family has them;
    GPT-2: (V + max_length)·C + L·(4C + 4C² + 4C + 2·C·F + F + C) + 2C, biases included (Radford et al. 2019).
    From the layers of finetune/lm/llama.py and finetune/lm/gpt.py."""
    return rest(shape) + shape.layers * block_parameters(shape)


def block_parameters(shape: Shape) -> int:
    return linear_weights(shape) + block_vectors(shape)


def block_vectors(shape: Shape) -> int:
    """Elements of a block's biases and norms."""
    biases = sum(shape.linears[name][1] for name in shape.biased)
    if shape.family == "gpt":
        return biases + 4 * shape.dim
    return biases + (4 if shape.post_norms else 2) * shape.dim + 2 * shape.head_dim * shape.qk_norm


def adapter_parameters(shape: Shape, rank: int, targets: Iterable[str]) -> int:
    """L · Σ r·(in + out) over the linear layers with an adapter (Hu et al. 2021, arXiv:2106.09685, §4.1: W + B·A)."""
    return shape.layers * sum(rank * sum(shape.linears[name]) for name in targets)


def block_adapters(shape: Shape, setup: Setup) -> int:
    """Trained by a block's adapters; DoRA adds a magnitude for each output (Liu et al. 2024, arXiv:2402.09353)."""
    count = adapter_parameters(shape, setup.lora_rank, setup.targets(shape)) // shape.layers
    return count + (outputs(shape, setup) if setup.adapter == "dora" else 0)


def head_adapter(shape: Shape, setup: Setup) -> int:
    """Trained by the adapter of the projection to the vocabulary."""
    if not setup.adapts_head:
        return 0
    return setup.lora_rank * (shape.dim + shape.vocab) + (shape.vocab if setup.adapter == "dora" else 0)


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
    """(number of trained parameters, bytes of one), modules that are trained whole next to adapters not counted."""
    if not setup.training:
        return 0, setup.element
    if setup.lora_rank:
        return shape.layers * block_adapters(shape, setup) + head_adapter(shape, setup), 4
    if setup.prompt:
        return setup.prompt * shape.dim, 4
    if setup.prefix:
        return setup.prefix * 2 * shape.layers * shape.kv_heads * shape.head_dim, 4
    return parameters(shape), setup.element


def trained_tensors(shape: Shape, setup: Setup) -> Tensors:
    """The trained tensors; their elements together are the count of `trained` and `whole_parameters`."""
    if not setup.training:
        return []
    rank, layers, c = setup.lora_rank, shape.layers, shape.dim
    if rank:
        sizes = [shape.linears[name] for name in setup.targets(shape)]
        matrices: Tensors = [(layers, pair, True) for a, b in sizes for pair in ((rank, a), (b, rank))]
        if setup.adapts_head:
            matrices += [(1, (rank, c), False), (1, (shape.vocab, rank), False)]
        made = [(layers, out) for _, out in sizes] + [(1, shape.vocab)] * setup.adapts_head
        matrices += [(count, (out,), False) for count, out in made if setup.adapter == "dora"]
        return matrices + whole_tensors(shape, setup)
    if setup.frozen:
        return [(1, (trained(shape, setup)[0],), False)]
    tensors: Tensors = [(shape.tables, (shape.vocab, c), False)]
    tensors += [(layers, (b, a), True) for a, b in shape.linears.values()]
    tensors += [(layers, (shape.linears[name][1],), False) for name in shape.biased]
    if shape.family == "gpt":
        return [*tensors, (int(shape.first), (shape.max_length, c), False), (4 * layers + 2 * shape.last, (c,), False)]
    norms = (4 if shape.post_norms else 2) * layers + shape.last
    return [*tensors, (norms, (c,), False), (2 * layers * shape.qk_norm, (shape.head_dim,), False)]


def quantized_blocks(shape: Shape, setup: Setup) -> int:
    """Blocks of 256 elements of the trained tensors, which begin a new block each."""
    return sum(count * -(-prod(size) // 256) for count, size, _ in trained_tensors(shape, setup))


def trained_matrices(shape: Shape, setup: Setup) -> int:
    """Trained numbers in the blocks' matrices, or their adapters': those that Muon updates."""
    return sum(count * prod(size) for count, size, matrix in trained_tensors(shape, setup) if matrix)


def factors(shape: Shape, setup: Setup) -> int:
    """Rows and columns of the trained matrices, elements of the vectors."""
    return sum(count * sum(size) for count, size, _ in trained_tensors(shape, setup))


def whole_at_once(shape: Shape) -> int:
    return max(2 * block_parameters(shape), shape.vocab * shape.dim)


def rest(shape: Shape) -> int:
    """Parameters outside of the blocks: tables and the last norm."""
    tables = shape.tables * shape.vocab * shape.dim
    if shape.family == "gpt":
        return tables + shape.first * shape.max_length * shape.dim + 2 * shape.last * shape.dim
    return tables + shape.last * shape.dim
