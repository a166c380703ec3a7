"""What a step of Flamingo's training keeps in memory, by formula, in fp32."""

from __future__ import annotations

from .model import Flamingo, FlamingoConfig


def memory(net: Flamingo, rows: int, images: int, tokens: int, learned: int, patches: int) -> dict[str, int]:
    """Bytes of a step on `rows` sequences of `images` images and `tokens` tokens, of which `learned` in all are
    predicted; an image has `patches` features, which were made before. Frozen models are weights only."""
    sizes = {name: sum(t.nbytes for t in (*part.parameters(), *part.buffers())) for name, part in
             (("encoder", net.encoder), ("language model", net.language_model))}  # fmt: skip
    trained = 4 * parameters(net.config, len(net.gated))
    statistics = 8 * net.config.vision_dim  # mean and deviation of the features
    kept = (
        rows * images * image_bytes(net.config, len(net.gated), patches)
        + rows * tokens * token_bytes(net)
        + rows * tokens * images * net.config.latents  # the mask, a byte for each pair
        + learned * (net.config.dim + net.language_model.config.vocab_size + 1) * 4  # states, log-probabilities
        + learned * 24  # where they are, and what is wanted
    )
    return {
        "encoder": sizes["encoder"],
        "language model": sizes["language model"],
        "added": trained + statistics,
        "gradients": trained,
        "optimizer states": 2 * trained,
        "activations": kept,
    }


def parameters(c: FlamingoConfig, gated: int) -> int:
    """Trained numbers: of the resampler, of the gated layers, and two embeddings."""
    inner, vision = c.heads * c.head_dim, c.vision_dim

    def mlp(dim: int) -> int:
        return 2 * dim + 2 * c.mult * dim**2

    layer = 4 * vision + 4 * vision * inner + mlp(vision)  # two norms; q, k, v and o
    resampler = (c.latents + c.frames + c.places) * vision + c.depth * layer + 2 * vision
    one = 2 * c.dim + 2 * c.dim * inner + 2 * vision * inner + mlp(c.dim) + 2
    return resampler + gated * one + 2 * c.dim


def image_bytes(c: FlamingoConfig, gated: int, patches: int) -> int:
    """What an image keeps: of each resampler layer the inputs of its norms with their statistics, those of its linear
    layers, queries, keys, values and the output of attention; and keys and values of each gated layer."""
    n, vision, inner = c.latents, c.vision_dim, c.heads * c.head_dim
    both = patches + n
    layer = (
        patches * 8  # statistics of the features' norm, whose input is kept once
        + n * (4 * vision + 8) + n * 4 * vision  # norm of the latents: its input; its output, the input of q
        + both * 4 * vision + both * 4 * 2 * inner  # input of k and v, and both
        + n * (4 * 2 * inner + 8 * c.heads)  # q, and the output of attention
        + n * (4 * vision + 8 + 4 * vision + 4 * 2 * c.mult * vision)  # MLP: norm, up, GELU, down
    )  # fmt: skip
    ends = patches * 4 * vision + n * (4 * vision + 8) + n * 4 * vision  # features; last norm; input of all k and v
    return c.depth * layer + ends + gated * n * 4 * 2 * inner


def token_bytes(net: Flamingo) -> int:
    """What a token keeps: in each gated layer, and in each block of the frozen language model behind the first of them,
    whose linear layers keep nothing."""
    c, lm = net.config, net.language_model.config
    inner = c.heads * c.head_dim
    gated = (
        4 * (c.dim + c.dim + 2 * inner + c.dim) + 8 + 8 * c.heads  # norm, q, attention, and what the gate multiplies
        + 4 * (c.dim + c.dim + 2 * c.mult * c.dim + c.dim) + 8
    )  # fmt: skip
    heads = lm.heads * lm.head_dim
    block = (
        2 * (4 * lm.dim + 4)  # two norms
        + 4 * (2 * heads + 2 * lm.kv_heads * lm.head_dim) + 8 * lm.heads  # attention
        + 4 * 2 * lm.hidden  # gate and up
    )  # fmt: skip
    behind = lm.layers - (c.every - 1)
    return len(net.gated) * gated + behind * block + 4 * lm.dim + 4 + 8 + 9  # last norm; position; which embedding
