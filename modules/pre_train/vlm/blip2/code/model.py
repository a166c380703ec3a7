"""The Q-Former of BLIP-2 (Li et al. 2023, arXiv:2301.12597, section 3.1) on the project's ops: a BERT whose sequence is

    learned queries · tokens of a text

Both attend to each other as a mask allows. In every k-th layer the queries attend to the image too; the text sees the
image through them alone. Queries and text have feed-forward layers of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import ops
from finetune.errors import UserError
from finetune.lm.layers import LayerNorm, embedding

Mask = Literal["itc", "itm", "itg"]


@dataclass
class QFormerConfig:
    """Shape of a Q-Former. `hidden=0` selects `4 · dim`."""

    image_dim: int  # of the image's features
    dim: int
    layers: int
    heads: int
    queries: int
    every: int = 2  # layers 0, every, 2 · every, … look at the image
    hidden: int = 0
    vocab_size: int = 0  # 0: a Q-Former without text, as in the second stage of BLIP-2
    max_length: int = 512  # tokens of a text
    projection: int = 256  # dimensions of the space in which images and texts are compared
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name in ("image_dim", "dim", "layers", "heads", "queries", "every", "max_length", "projection"):
            if getattr(self, name) < 1:
                raise UserError(f"a Q-Former needs {name} of at least 1, not {getattr(self, name)}")
        if self.dim % self.heads:
            raise UserError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        self.hidden = self.hidden or 4 * self.dim


def visible(kind: Mask, queries: int, tokens: int, lengths: Tensor | None = None) -> Tensor:
    """(B or 1, Q + T, Q + T) bool: what the queries and the tokens of a text see of each other (the paper's figure 2).

    itc  queries see queries, tokens see tokens: neither knows the other
    itm  all see all
    itg  queries see queries; a token sees the queries, itself and the tokens before it
    lengths (B,): nobody sees the tokens of row b from lengths[b] on; the queries see at least each other.
    """
    if kind not in get_args(Mask):
        raise UserError(f"there is no mask {kind!r} (only {', '.join(get_args(Mask))})")
    place = torch.arange(queries + tokens)
    text = place >= queries
    if kind == "itm":
        seen = torch.ones(queries + tokens, queries + tokens, dtype=torch.bool)
    elif kind == "itc":
        seen = text[:, None] == text
    else:
        seen = ~text | (text[:, None] & (place <= place[:, None]))
    if lengths is None:
        return seen[None]
    real = place - queries < lengths[:, None]  # (B, Q + T)
    return seen & real[:, None]


class Attention(nn.Module):
    """norm(x + attention(x)): BERT's, normalized behind the sum. Keys and values come from `states`."""

    def __init__(self, config: QFormerConfig, states: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.o = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)
        self.k, self.v = nn.Linear(states, config.dim), nn.Linear(states, config.dim)
        self.norm = LayerNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            part(of).unflatten(-1, (self.heads, -1))  # (B, T, H, D)
            for part, of in ((self.q, x), (self.k, states), (self.v, states))
        )
        return self.norm(x + self.o(ops.attention(q, k, v, causal=False, mask=mask).flatten(-2)))

    def weights(self, x: Tensor, states: Tensor) -> Tensor:
        """(B, H, T, N) fp32: how much each query takes from each state. For pictures; `forward` never makes it."""
        q, k = (part(of).unflatten(-1, (self.heads, -1)) for part, of in ((self.q, x), (self.k, states)))
        return (torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * q.shape[-1] ** -0.5).softmax(-1)


class MLP(nn.Module):
    """norm(x + down(gelu(up(x)))), the GELU with erf."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(config.dim, config.hidden), nn.Linear(config.hidden, config.dim)
        self.norm = LayerNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Block(nn.Module):
    """Self-attention of queries and text; the queries' attention to the image, in some layers; two feed-forwards."""

    def __init__(self, config: QFormerConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, config.dim)
        self.cross = Attention(config, config.image_dim) if layer % config.every == 0 else None
        self.query_mlp = MLP(config)
        self.text_mlp = MLP(config) if config.vocab_size else None

    def forward(self, x: Tensor, queries: int, image: Tensor | None, mask: Tensor | None) -> Tensor:
        """x (B, Q + T, C), of which the first `queries` are queries; image (B, N, image_dim); mask of `visible`."""
        x = self.attn(x, x, mask)
        q, text = x[:, :queries], x[:, queries:]
        if queries:
            if self.cross is not None and image is not None:
                q = self.cross(q, image)
            q = self.query_mlp(q)
        if text.shape[1]:
            if self.text_mlp is None:
                raise UserError("this Q-Former has no feed-forward layers for text: it takes queries alone")
            text = self.text_mlp(text)
        return torch.cat([q, text], 1)


class QFormer(nn.Module):
    """Queries and text over an image: what each of them is after the last layer."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.empty(config.queries, config.dim))
        if config.vocab_size:
            self.words = embedding(config.vocab_size, config.dim)
            self.places = embedding(config.max_length, config.dim)
        self.norm = LayerNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        if self.queries.device.type != "meta":
            initialize(self, config.dim)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, C): word and position."""
        if not self.config.vocab_size:
            raise UserError("this Q-Former has no words: it takes queries alone")
        if tokens.shape[1] > self.config.max_length:
            raise UserError(f"{tokens.shape[1]} tokens do not fit the Q-Former's maximum of {self.config.max_length}")
        return self.words(tokens) + self.places.weight[: tokens.shape[1]]

    def forward(
        self,
        image: Tensor | None = None,
        tokens: Tensor | None = None,
        lengths: Tensor | None = None,
        kind: Mask = "itm",
    ) -> tuple[Tensor, Tensor]:
        """The states (B, Q, C) of the queries, none without an image, and (B, T, C) of the text, none without tokens.

        image (B, N, image_dim), tokens (B, T) with lengths (B,), `kind` of mask if both are there. UserError if neither
        is, or if the Q-Former has no words."""
        if image is None and tokens is None:
            raise UserError("a Q-Former needs an image or a text")
        parts = []
        if image is not None:
            parts.append(self.queries.expand(len(image), -1, -1))
        if tokens is not None:
            parts.append(self.embed(tokens))
        count = self.config.queries if image is not None else 0
        x = self.norm(torch.cat(parts, 1))
        mask = None
        if tokens is not None and (count or lengths is not None):
            mask = visible(kind if count else "itm", count, tokens.shape[1], lengths).to(x.device)
        for block in self.blocks:
            x = block(x, count, image, mask)
        return x[:, :count], x[:, count:]

    def looks(self, image: Tensor) -> list[Tensor]:
        """(B, H, Q, N) of each layer that looks at the image: where the queries look."""
        found = []
        x = self.norm(self.queries.expand(len(image), -1, -1))
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block.attn(x, x)
            if block.cross is not None:
                found.append(block.cross.weights(x, image))
                x = block.cross(x, image)
            x = block.query_mlp(x)
        return found


class Stage1(nn.Module):
    """A Q-Former with the heads of the first stage: two projections that are compared, a match, a text.

    `temperature` is ITC's, learned. The head that writes is BERT's: dense, GELU, norm, then the word table."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.qformer = QFormer(config)
        self.image_projection = nn.Linear(config.dim, config.projection)
        self.text_projection = nn.Linear(config.dim, config.projection)
        self.match = nn.Linear(config.dim, 2)  # no, yes
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.write = nn.Linear(config.dim, config.dim)
        self.write_norm = LayerNorm(config.dim, config.norm_eps)
        self.write_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if self.match.weight.device.type != "meta":
            initialize(self, config.dim)

    def image_vectors(self, image: Tensor) -> Tensor:
        """(B, Q, projection) of length 1: a vector of each query."""
        return F.normalize(self.image_projection(self.qformer(image)[0]), dim=-1)

    def text_vectors(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, projection) of length 1: the first token's vector."""
        return F.normalize(self.text_projection(self.qformer(None, tokens, lengths)[1][:, 0]), dim=-1)

    def matches(self, image: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, 2) logits of "no" and "yes": the mean over the queries, which see the text."""
        return self.match(self.qformer(image, tokens, lengths, "itm")[0]).mean(1)

    def written(self, image: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, V) logits of the next token."""
        states = self.qformer(image, tokens, lengths, "itg")[1]
        return F.linear(self.write_norm(F.gelu(self.write(states))), self.qformer.words.weight, self.write_bias)


class Stage2(nn.Module):
    """A Q-Former without text whose queries, projected, are vectors of a language model: they come before its tokens.

    The scale of the projection's initial weights gives vectors as long as the model's own embeddings, `scale` each."""

    def __init__(self, config: QFormerConfig, language_dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.qformer = QFormer(config)
        self.projection = nn.Linear(config.dim, language_dim)
        if self.projection.weight.device.type != "meta":
            nn.init.normal_(self.projection.weight, std=scale * config.dim**-0.5)
            nn.init.zeros_(self.projection.bias)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, N, image_dim) → (B, Q, language_dim)."""
        return self.projection(self.qformer(image)[0])


def without_text(qformer: QFormer) -> QFormer:
    """A copy that takes queries alone, as the second stage does: no word table and no feed-forwards of the text."""
    copy = QFormer(replace(qformer.config, vocab_size=0))
    theirs = qformer.state_dict()
    copy.load_state_dict({name: theirs[name] for name in copy.state_dict()})
    return copy


@torch.no_grad()
def initialize(model: nn.Module, dim: int) -> None:
    """BERT's initial weights, N(0, .02), biases 0; wider for a narrow model, whose signal would be lost."""
    deviation = max(0.02, dim**-0.5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, deviation)
        elif name.endswith("bias"):
            parameter.zero_()
