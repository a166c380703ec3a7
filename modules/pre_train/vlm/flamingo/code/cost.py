"""What a step of Flamingo's training keeps in memory, by formula and measured, in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from finetune import memory, optim
from finetune.lm.llama import Llama, LlamaConfig
from finetune.memory import meters
from finetune.memory.plan import Plan
from finetune.memory.setup import Term
from finetune.vision.vit import ViT, ViTConfig

from .model import Flamingo, FlamingoConfig


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
    ends = patches * 4 * vision + n * (4 * vision + 8)  # features; the last norm, whose output all k and v come from
    return c.depth * layer + ends + gated * n * 4 * 2 * inner  # the first latents are the parameter itself


def token_bytes(c: FlamingoConfig, lm: LlamaConfig) -> int:
    """What a token keeps: in each gated layer, and in each block of the frozen language model, whose linear layers keep
    nothing. A gradient flows from the first block on, to the added embeddings."""
    inner, heads = c.heads * c.head_dim, lm.heads * lm.head_dim
    gated = (
        4 * (c.dim + c.dim + 2 * inner + c.dim) + 8 + 8 * c.heads  # norm, q, attention, and what the gate multiplies
        + 4 * (c.dim + c.dim + 2 * c.mult * c.dim + c.dim) + 8
    )  # fmt: skip
    block = (
        2 * (4 * lm.dim + 4)  # two norms
        + 4 * (2 * heads + 2 * lm.kv_heads * lm.head_dim) + 8 * lm.heads  # attention
        + 4 * 2 * lm.hidden  # gate and up
    )  # fmt: skip
    return layers(c, lm) * gated + lm.layers * block + 4 * lm.dim + 4 + 10  # last norm; which embedding


def layers(c: FlamingoConfig, lm: LlamaConfig) -> int:
    """Gated layers."""
    return lm.layers // c.every


def plan(
    c: FlamingoConfig, lm: LlamaConfig, vision: ViTConfig, rows: int, images: int, learned: int, patches: int
) -> Plan:
    """For `python -m finetune memory flamingo`: a step on `rows` sequences of `images` images and three times as many
    tokens, of which `learned` are predicted. An image (or clip) has `patches` features, made before the training by the
    frozen encoder, which is weights only. The language model's activations are needed, its gradients are not."""
    with torch.device("meta"):
        encoder, language_model = size_of(ViT(vision)), size_of(Llama(lm))
    gated, tokens = layers(c, lm), 3 * images
    count = parameters(c, gated)
    kept = {
        "image": rows * images * image_bytes(c, gated, patches),
        "token": rows * tokens * token_bytes(c, lm),
        "mask": rows * tokens * images * c.latents,
        "loss": learned * (4 * (c.dim + lm.vocab_size + 1) + 8),  # states, log-probabilities; what is wanted
        "once": 8 * tokens + 8 * gated + 4,  # positions; gates; the number of losses
    }
    formula = "B·M·I + B·T·t + B·T·M·n + S·(4·(C + v + 1) + 8) + 8·T + 8·G + 4"
    terms = (
        Term("encoder", encoder, "frozen", "weights only: its features are made once"),
        Term("language model", language_model, "frozen", "no gradients, no states"),
        Term("added", 4 * (count + 2 * c.vision_dim), "(P + 2·V)·4", "resampler, gated layers, two embeddings"),
        Term("gradients", 4 * count, "P·4", "of what is added"),
        Term("optimizer states", 8 * count, "P·8", "AdamW's two moments"),
        Term("activations", sum(kept.values()), formula, "what each op saves"),
    )
    letters = {
        "P": (count, "trained parameters"), "V": (c.vision_dim, "width of the features"),
        "G": (gated, "gated layers"), "B": (rows, "sequences"), "M": (images, "images of one"),
        "T": (tokens, "tokens of one"), "I": (image_bytes(c, gated, patches), "bytes of an image"),
        "t": (token_bytes(c, lm), "bytes of a token"), "n": (c.latents, "latents"), "S": (learned, "predicted tokens"),
        "C": (c.dim, "width of the language model"), "v": (lm.vocab_size, "its vocabulary"),
    }  # fmt: skip

    def measure() -> dict[str, int]:
        net = Flamingo(ViT(vision), Llama(lm), c)
        optimizer = optim.AdamW(net.trained().values(), lr=0.0)
        tokens = torch.tensor([net.image, 0, net.end_of_chunk]).repeat(rows, images)
        features = torch.zeros(rows, images, max(c.frames, 1), patches // max(c.frames, 1), c.vision_dim)
        places = torch.arange(rows * 3 * images).view(rows, -1) < learned

        def loss() -> Tensor:
            logits = net.logits(net.hidden(tokens, net.media(features))[places]).float()
            return nn.functional.cross_entropy(logits, tokens[places].clamp(max=net.end_of_chunk))

        loss().backward()
        optimizer.step()
        return step_bytes(net, optimizer, loss)

    what = f"{rows} sequences of {images} images and {tokens} tokens, {gated} gated layers, {lm.layers} frozen blocks"
    return Plan(what, count, terms, measure, letters)


def size_of(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def step_bytes(net: Flamingo, optimizer: optim.AdamW, loss: Callable[[], Tensor]) -> dict[str, int]:
    """The same bytes, and the step's growth of the process, as measured."""
    found = memory.measure(net, optimizer, loss)
    found |= {"encoder": meters.weight_bytes(net.encoder), "language model": meters.weight_bytes(net.language_model)}
    found["added"] = found.pop("weights") - found["encoder"] - found["language model"]
    return found
