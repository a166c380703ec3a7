"""Flamingo (Alayrac et al. 2022, arXiv:2204.14198): a frozen language model that looks at images between its blocks.

    image → frozen encoder → features → resampler → a few latents, as many for a clip as for an image
    text  → before every n-th block of the language model:
                x = x + tanh(a) · attention(norm(x), latents of the last image in front of the token)
                x = x + tanh(b) · MLP(norm(x))                      a = b = 0 at the start: nothing changes

Two tokens are added to the vocabulary V of the language model: V ends a chunk (an image's text), V + 1 stands where an
image is shown. Blocks equal those of OpenFlamingo (Awadalla et al. 2023, arXiv:2308.01390).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import ops
from finetune.errors import UserError
from finetune.lm import head
from finetune.lm.cache import KVCache
from finetune.lm.layers import LayerNorm
from finetune.lm.llama import Llama
from finetune.vision.vit import ViT

Keys = tuple[Tensor, Tensor]  # keys and values, each (B, N, heads, head_dim)


@dataclass
class FlamingoConfig:
    """Shape of what is trained: the resampler and the gated layers. The defaults are OpenFlamingo's."""

    vision_dim: int  # width of the encoder's features
    dim: int  # width of the language model
    latents: int = 64  # vectors that the resampler makes of an image or a clip
    depth: int = 6  # layers of the resampler
    heads: int = 8
    head_dim: int = 64
    every: int = 1  # a gated layer before every n-th block
    frames: int = 0  # longest clip: each frame has a time embedding; 0: images only
    places: int = 0  # most images of a sequence that have an embedding of their place; 0: images have none
    only_preceding: bool = True  # a token sees the last image in front of it; otherwise all images in front of it
    mult: int = 4  # width of the MLPs over that of their inputs

    def __post_init__(self) -> None:
        for name in ("vision_dim", "dim", "latents", "depth", "heads", "head_dim", "every", "mult"):
            if getattr(self, name) < 1:
                raise UserError(f"Flamingo needs {name} of at least 1, not {getattr(self, name)}")
        for name in ("frames", "places"):
            if getattr(self, name) < 0:
                raise UserError(f"Flamingo needs {name} of at least 0, not {getattr(self, name)}")


class MLP(nn.Module):
    """down(GELU(up(norm(x)))), without biases."""

    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.up = nn.Linear(dim, mult * dim, bias=False)
        self.down = nn.Linear(mult * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class CrossAttention(nn.Module):
    """Queries of `dim` attend to keys and values made of vectors of `source_dim`, without biases."""

    def __init__(self, dim: int, source_dim: int, config: FlamingoConfig) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_dim
        self.q = nn.Linear(dim, inner, bias=False)
        self.kv = nn.Linear(source_dim, 2 * inner, bias=False)
        self.o = nn.Linear(inner, dim, bias=False)

    def keys(self, source: Tensor) -> Keys:
        k, v = self.kv(source).unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, N, H, D)
        return k, v

    def forward(self, x: Tensor, keys: Keys, mask: Tensor | None = None) -> Tensor:
        """x (B, T, dim), mask (B, T, N): which keys a query sees. One that sees none gives 0."""
        q = self.q(x).unflatten(-1, (self.heads, -1))
        return self.o(ops.attention(q, *keys, causal=False, mask=mask).flatten(-2))


class ResamplerLayer(nn.Module):
    """Latents attend to the features and to themselves, then pass an MLP."""

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__()
        dim = config.vision_dim
        self.norm_features, self.norm_latents = LayerNorm(dim), LayerNorm(dim)
        self.attn = CrossAttention(dim, dim, config)
        self.mlp = MLP(dim, config.mult)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        normed = self.norm_latents(latents)
        seen = torch.cat([self.norm_features(features), normed], 1)
        latents = latents + self.attn(normed, self.attn.keys(seen))
        return latents + self.mlp(latents)


class Resampler(nn.Module):
    """The Perceiver resampler: features (B, M, frames, patches, C) of M images a row → latents (B, M, latents, C)."""

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.latents, config.vision_dim))
        self.frames = nn.Parameter(torch.randn(config.frames, config.vision_dim)) if config.frames else None
        self.places = nn.Parameter(torch.randn(config.places, config.vision_dim)) if config.places else None
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.vision_dim)

    @property
    def last(self) -> ResamplerLayer:
        layer = self.layers[-1]
        assert isinstance(layer, ResamplerLayer)
        return layer

    def forward(self, features: Tensor) -> Tensor:
        rows, images, frames = features.shape[:3]
        features = features.to(self.latents.dtype)
        if frames > (1 if self.frames is None else len(self.frames)):
            most = "images only" if self.frames is None else f"clips of at most {len(self.frames)} frames"
            raise UserError(f"a clip of {frames} frames: the resampler takes {most} (frames of its config)")
        if self.frames is not None:
            features = features + self.frames[:frames, None]  # when a frame is shown
        if self.places is not None:
            if images > len(self.places):
                raise UserError(f"{images} images: the resampler has embeddings of {len(self.places)} (places)")
            features = features + self.places[:images, None, None]
        x = features.flatten(2, 3).flatten(0, 1)  # (B · M, frames · patches, C)
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, x)
        return self.norm(latents).unflatten(0, (rows, images))


class GatedLayer(nn.Module):
    """Cross-attention to images and an MLP, each multiplied by the tanh of a gate that begins at 0."""

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.dim)
        self.attn = CrossAttention(config.dim, config.vision_dim, config)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.mlp = MLP(config.dim, config.mult)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, keys: Keys | None, mask: Tensor | None) -> Tensor:
        if keys is not None:  # a batch without images has only the MLP
            x = x + self.attn_gate.tanh() * self.attn(self.norm(x), keys, mask)
        return x + self.mlp_gate.tanh() * self.mlp(x)


@dataclass
class Media:
    """The images of a batch as the gated layers see them, made once for any number of forward passes.

    keys: layer → keys and values (B, M · latents, H, D)
    counts: (B,) how many of the M images a row has, the first ones
    seen: (B,) how many of them stand in front of the tokens to come: those that a KV cache holds
    """

    keys: dict[str, Keys]
    counts: Tensor
    seen: Tensor
    images: int  # M

    def repeat(self, times: int) -> Media:
        """Every row `times` times in succession, such as for one row an answer."""
        keys = {
            layer: (k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for layer, (k, v) in self.keys.items()
        }
        return Media(keys, self.counts.repeat_interleave(times), self.seen.repeat_interleave(times), self.images)


def media_mask(shown: Tensor, images: int, latents: int, before: Tensor, only_preceding: bool = True) -> Tensor:
    """(B, T, images · latents) bool: which latents each token sees.

    shown (B, T): where an image is shown; before (B,): the row's images in front of the first token. A token at such a
    place sees that image; with `only_preceding` no earlier one. A token in front of the first image sees none."""
    last = before[:, None] + shown.cumsum(1)  # (B, T): number of the last image, from 1; 0: there is none
    number = torch.arange(1, images + 1, device=shown.device).repeat_interleave(latents)
    return number == last[..., None] if only_preceding else number <= last[..., None]


def rolled(x: Tensor, by: Tensor) -> Tensor:
    """x (B, T, …) with row b moved by[b] places to the left; what leaves comes in on the right."""
    steps = torch.arange(x.shape[1], device=x.device)
    return x[torch.arange(len(x), device=x.device)[:, None], (steps + by[:, None]) % x.shape[1]]


class Flamingo(nn.Module):
    """The model: frozen encoder and language model, trained resampler, gated layers and two embeddings."""

    mean: Tensor  # of the features, (vision_dim,)
    deviation: Tensor

    def __init__(self, encoder: ViT, language_model: Llama, config: FlamingoConfig, ends_with: int = 0) -> None:
        """ends_with: the language model's own token that is most like the end of a chunk, whose embedding it starts
        from; that of an image starts from the mean."""
        super().__init__()
        if not isinstance(language_model, Llama):
            raise UserError(f"Flamingo wraps a Llama, not a {type(language_model).__name__}")
        widths = {"vision_dim": encoder.config.dim, "dim": language_model.config.dim}
        for name, width in widths.items():
            if getattr(config, name) != width:
                raise UserError(f"{name} is {getattr(config, name)}, but the frozen model's width is {width}")
        layers = range(config.every - 1, language_model.config.layers, config.every)
        if not layers:
            raise UserError(f"every {config.every}: the language model has only {language_model.config.layers} blocks")
        self.config = config
        self.encoder = encoder.eval().requires_grad_(False)
        self.language_model = language_model.eval().requires_grad_(False)
        self.resampler = Resampler(config)
        self.gated = nn.ModuleDict({str(layer): GatedLayer(config) for layer in layers})
        self.end_of_chunk = language_model.config.vocab_size
        self.image = self.end_of_chunk + 1
        self.register_buffer("mean", torch.zeros(config.vision_dim))
        self.register_buffer("deviation", torch.ones(config.vision_dim))
        table = language_model.embed.weight.detach()
        self.added = nn.Parameter(torch.stack([table[ends_with], table.mean(0)]))

    def layers(self) -> dict[str, GatedLayer]:
        """The gated layers by the number of the block behind them."""
        return {name: layer for name, layer in self.gated.items() if isinstance(layer, GatedLayer)}

    def trained(self) -> dict[str, nn.Parameter]:
        """Name → parameter of all that is not frozen."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def features(self, images: Tensor, layer: int = -1) -> Tensor:
        """Images (B, M, C, height, width), or clips with frames behind M, → (B, M, frames, patches, C) of the frozen
        encoder."""
        clips = images if images.dim() == 6 else images.unsqueeze(2)
        if clips.dim() != 6:
            raise UserError(f"images have the shape {tuple(images.shape)}, not (batch, images, [frames,] C, H, W)")
        found = self.encoder.features(clips.flatten(0, 2), layer).unflatten(0, clips.shape[:3])
        return (found - self.mean) / self.deviation

    @torch.no_grad()
    def standardize(self, images: Tensor) -> None:
        """Sets the mean and the deviation that `features` removes to those of these images (N, C, H, W). What all
        images share would hide at first what tells them apart: latents of all images would be alike."""
        self.mean.zero_()
        self.deviation.fill_(1)
        found = torch.cat([self.features(part[:, None]).flatten(0, 3) for part in images.split(250)])
        self.mean.copy_(found.mean(0))
        self.deviation.copy_(found.std(0))

    def media(self, features: Tensor, counts: Tensor | None = None) -> Media:
        """What the gated layers see of features (B, M, frames, patches, C); of row b the first counts[b] images."""
        rows, images = features.shape[:2]
        none = torch.zeros(rows, dtype=torch.int64, device=features.device)
        latents = self.resampler(features).flatten(1, 2) if images else None
        keys = {} if latents is None else {name: layer.attn.keys(latents) for name, layer in self.layers().items()}
        return Media(keys, none + images if counts is None else counts, none, images)

    def embeddings(self, tokens: Tensor) -> Tensor:
        """(…) → (…, C): the language model's, and ours for the two added tokens."""
        ours = tokens >= self.end_of_chunk
        theirs = self.language_model.embeddings(tokens.masked_fill(ours, 0))
        added = self.added[(tokens - self.end_of_chunk).clamp(0, 1)]
        return torch.where(ours[..., None], added, theirs)

    def hidden(
        self,
        tokens: Tensor,
        media: Media | None = None,
        *,
        lengths: Tensor | None = None,
        cache: KVCache | None = None,
        side: Literal["right", "left"] = "right",
    ) -> Tensor:
        """The state (B, T, C) after the language model's last norm. Arguments as `forward`."""
        if side == "left" and lengths is not None:  # computed as if the padding stood on the right
            begin = tokens.shape[1] - lengths
            return rolled(self.hidden(rolled(tokens, begin), media, lengths=lengths, cache=cache), -begin)
        if self.language_model.gradient_checkpointing:
            raise UserError("gradient checkpointing of the frozen language model is not supported with gated layers")
        if tokens.numel() and int(tokens.max()) > self.image:
            raise UserError(f"token {int(tokens.max())}: the last one is {self.image}, which shows an image")
        shown = tokens == self.image
        if lengths is not None:
            shown = shown & (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])
        mask = self.check(shown, media, cache is not None)
        text = tokens.masked_fill(tokens >= self.end_of_chunk, 0)
        with self.looking(media, mask):
            x = self.language_model(text, lengths=lengths, cache=cache, embedded=self.embeddings(tokens), hidden=True)
        if media is not None and cache is not None:
            media.seen = media.seen + shown.sum(1)
        return x

    def check(self, shown: Tensor, media: Media | None, more: bool) -> Tensor | None:
        """The mask of the gated layers. UserError if a row's placeholders are not as many as its images; with a cache
        some may come `more` later."""
        placeholders = shown.sum(1)
        counts = torch.zeros_like(placeholders) if media is None else media.counts
        known = placeholders if media is None else placeholders + media.seen
        for row in ((known > counts) if more else (known != counts)).nonzero().flatten().tolist():
            raise UserError(f"row {row} of the batch has {int(known[row])} placeholders for {int(counts[row])} images")
        if media is None or not media.keys:
            return None
        return media_mask(shown, media.images, self.config.latents, media.seen, self.config.only_preceding)

    @contextmanager
    def looking(self, media: Media | None, mask: Tensor | None) -> Iterator[None]:
        """While this lasts, every n-th block of the language model is given what its gated layer makes of its input."""

        def before(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
            keys = media.keys.get(name) if media is not None else None
            return lambda block, inputs: (self.gated[name](inputs[0], keys, mask), *inputs[1:])

        blocks = self.language_model.blocks
        hooks = [blocks[int(name)].register_forward_pre_hook(before(name)) for name in self.gated]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, C) → (…, V + 1): the language model's, then the end of a chunk. An image is never generated."""
        end = F.linear(hidden, self.added[:1])
        return torch.cat([head.logits(self.language_model, hidden), end], -1)

    def forward(
        self,
        tokens: Tensor,
        media: Media | None = None,
        *,
        lengths: Tensor | None = None,
        cache: KVCache | None = None,
        side: Literal["right", "left"] = "right",
    ) -> Tensor:
        """Logits (B, T, V + 1) of tokens (B, T), in which `self.image` stands where an image is shown.

        media: the batch's images, None for text. lengths (B,): rows are padded to T tokens, on this side.
        cache: tokens of earlier calls are attended to, and their images counted.
        UserError: a row with more or fewer placeholders than images, a token that does not exist."""
        return self.logits(self.hidden(tokens, media, lengths=lengths, cache=cache, side=side))

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, media: Media | None = None, *, lengths: Tensor | None = None, most: int = 16
    ) -> list[list[int]]:
        """The most probable next tokens of each row, up to `most` or to the end of the chunk, which is not included.
        Images are encoded once, in `media`; each new token is one position of the language model."""
        rows, steps = tokens.shape
        cache = KVCache(self.language_model, rows, steps + most)
        given = torch.full((rows,), steps, device=tokens.device) if lengths is None else lengths
        media = None if media is None else Media(media.keys, media.counts, media.seen, media.images)
        x = self.hidden(tokens, media, lengths=lengths, cache=cache)
        x = x[torch.arange(rows), given - 1]  # (B, C): each row's last token
        answers: list[list[int]] = [[] for _ in range(rows)]
        going = torch.ones(rows, dtype=torch.bool, device=tokens.device)
        for step in range(most):
            new = self.logits(x).argmax(-1)  # (B,)
            going = going & (new != self.end_of_chunk)
            for row in going.nonzero().flatten().tolist():
                answers[row].append(int(new[row]))
            if step + 1 == most or not going.any():
                break
            x = self.hidden(new.masked_fill(~going, self.end_of_chunk)[:, None], media, cache=cache)[:, 0]
        return answers
