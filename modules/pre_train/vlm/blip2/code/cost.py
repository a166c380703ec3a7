"""What BLIP-2 costs, by formula: parameters, and bytes of a step of the second stage by name."""

from __future__ import annotations

from finetune import memory
from finetune.lm.llama import LlamaConfig
from finetune.memory.setup import Setup, shape_of
from finetune.vision.vit import ViTConfig

from .model import QFormerConfig


def parameters(c: QFormerConfig) -> int:
    """Of a Q-Former: queries, words and places, the first norm, and in each layer attention, the look at the image, and
    feed-forwards of queries and text."""
    attention = 4 * c.dim * (c.dim + 1) + 2 * c.dim
    look = 2 * c.dim * (c.dim + 1) + 2 * c.dim * (c.image_dim + 1) + 2 * c.dim
    mlp = 2 * c.dim * c.hidden + c.hidden + 3 * c.dim
    words = (c.vocab_size + c.max_length) * c.dim if c.vocab_size else 0
    layers = c.layers * (attention + (2 if words else 1) * mlp)
    return (c.queries + 2) * c.dim + words + layers + -(-c.layers // c.every) * look


def encoder_parameters(c: ViTConfig) -> int:
    """Of an encoder of CLIP's shape: patches, class token, positions, blocks, the norms around them, projection."""
    tokens = c.grid[0] * c.grid[1] + c.class_token
    block = 4 * c.dim * (c.dim + 1) + 2 * c.dim * c.hidden + c.dim + c.hidden + 4 * c.dim
    patches = c.dim * (c.channels * c.patch**2 + c.patch_bias) + c.dim * c.class_token
    return patches + tokens * c.dim + c.layers * block + 2 * c.dim * (1 + c.pre_norm) + c.dim * c.projection


def activations(c: QFormerConfig, rows: int, features: int, element: int = 4) -> int:
    """Bytes that the pass of the queries alone keeps for its backward pass.

    A query keeps in each layer, in numbers of the width: attention's input, q, k, v, its output, and the sum that is
    normalized, 6; the feed-forward's input and sum, 2, and its hidden state before and behind the GELU; where it looks
    at the image, input, q, output and sum, 4. An image's features keep k and v. Statistics: 8 bytes a norm and head."""
    looks = -(-c.layers // c.every)
    numbers = c.layers * (8 * c.dim + 2 * c.hidden) + looks * 4 * c.dim + 3 * c.dim
    statistics = c.layers * (16 + 8 * c.heads) + looks * (8 + 8 * c.heads) + 8
    image = features * (looks * 2 * c.dim + c.image_dim)
    return rows * (c.queries * (numbers * element + statistics) + image * element)


def second_stage(
    c: QFormerConfig, vision: ViTConfig, language: LlamaConfig, rows: int, features: int, tokens: int, dtype: str
) -> dict[str, int]:
    """Bytes of a step by name: `rows` images of `features` vectors each, and rows of `tokens` with the queries. The
    language model is frozen; a gradient flows through it to the queries."""
    setup = Setup(batch=rows, seq=tokens, dtype="fp32" if dtype == "float32" else "bf16", prompt=1)
    terms = {term.name: term.bytes for term in memory.predict(shape_of(language), setup)}
    trained = parameters(c) + language.dim * (c.dim + 1)
    return {
        "encoder": 4 * encoder_parameters(vision),
        "language model": terms["weights"] - 4 * language.dim,
        "Q-Former and projection": 4 * trained,
        "gradients": 4 * trained,
        "optimizer states": 8 * trained,
        "activations": terms["activations"] + activations(c, rows, features),
    }
