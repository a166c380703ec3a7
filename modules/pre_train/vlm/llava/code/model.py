"""LLaVA (Liu et al. 2023, arXiv:2304.08485; the two-layer projector is LLaVA-1.5's, arXiv:2310.03744): an image becomes
vectors in the place of `<image>` tokens, and a language model goes on from there as if they were words.

    features  = encoder's states of layer −2, without the class token        (P, D)
    vectors   = W₂ · GELU(W₁ · features + b₁) + b₂                           (P, C)
    input     = embeddings of the tokens, the P image tokens' replaced by the vectors
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.lm import head
from finetune.lm.cache import KVCache
from finetune.lm.forward import Cache
from finetune.lm.llama import Llama, LlamaConfig
from finetune.vision.vit import ViT, ViTConfig


@dataclass
class LlavaConfig:
    """Shapes of the parts. `image_token` stands for one vector of an image; it may lie outside the vocabulary."""

    vision: ViTConfig
    text: LlamaConfig
    image_token: int
    layer: int = -2  # of the encoder, whose states are taken
    class_token: bool = False  # keep the class token's state too
    columns: int = 0  # strips, from left to right, each averaged to one vector; 0: the patches as they are

    def __post_init__(self) -> None:
        if self.columns and (self.class_token or self.vision.grid[1] % self.columns):
            across = self.vision.grid[1]
            raise UserError(f"{self.columns} columns need patches alone, and a divisor of the {across} across an image")

    @property
    def each(self) -> int:
        """Vectors of an image."""
        rows, columns = self.vision.grid
        if self.columns:
            return self.columns
        return rows * columns + (self.class_token and self.vision.class_token)


class Projector(nn.Module):
    """From the encoder's states (…, D) to the language model's embeddings (…, C)."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features.to(self.linear_1.weight.dtype))))


class Llava(nn.Module):
    """Encoder, projector, language model."""

    def __init__(self, config: LlavaConfig, encoder: ViT | None = None, language: Llama | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = ViT(config.vision) if encoder is None else encoder
        self.projector = Projector(config.vision.dim, config.text.dim)
        self.language = Llama(config.text) if language is None else language

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, channels, H, W) → features (N, P, D). An encoder none of whose parameters is trained keeps nothing
        for a backward pass."""
        learns = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            states = self.encoder.states(images, self.config.layer)
        if self.config.class_token:
            return states
        patches = states[:, int(self.encoder.config.class_token) :]
        if not self.config.columns:
            return patches
        rows, across = self.config.vision.grid
        strips = patches.unflatten(1, (rows, self.config.columns, across // self.config.columns))
        return strips.mean((1, 3))

    def project(self, images: Tensor) -> Tensor:
        """Images (N, channels, H, W) → (N, P, C): what stands in the places of each image's tokens."""
        return self.projector(self.encode(images))

    def embed(self, tokens: Tensor, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) without image tokens, which are 0 in their place, and (B, T, C): their embeddings, and in the
        places of the image tokens `vectors` (N, P, C), in order. UserError unless there is one for each."""
        here = tokens == self.config.image_token
        plain = tokens.masked_fill(here, 0)
        x = self.language.embeddings(plain)
        given = 0 if vectors is None else vectors.shape[0] * vectors.shape[1]
        if (wanted := int(here.sum())) != given:
            raise UserError(f"the rows have {wanted} image tokens, the images give {given} vectors")
        if vectors is not None:
            x = x.index_put((here,), vectors.flatten(0, 1).to(x.dtype))
        return plain, x

    def forward(
        self,
        tokens: Tensor,
        images: Tensor | None = None,
        *,
        vectors: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cache: Cache | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or with `hidden` the states after the last norm (B, T, C), of tokens (B, T) and all their
        images (N, channels, H, W) in order, or of what `project` has made of these (`vectors`).

        mask (B, T): 1 for real tokens, the others pad on the left or on the right, and get the numbers of some token.
        lengths (B,): the same for rows padded on the right. cache: of earlier calls, as the language model's."""
        if images is not None:
            vectors = self.project(images)
        back = None
        if mask is not None:
            order = (~mask.bool()).to(torch.uint8).argsort(dim=1, stable=True)  # real tokens first
            tokens, lengths, back = tokens.gather(1, order), mask.long().sum(1), order.argsort(dim=1)
            if bool((lengths == tokens.shape[1]).all()):
                lengths = None
        plain, x = self.embed(tokens, vectors)
        states = self.language(plain, embedded=x, lengths=lengths, cache=cache, hidden=True)
        if back is not None:
            states = states.gather(1, back[..., None].expand_as(states))
        return states if hidden else head.logits(self.language, states)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        vectors: Tensor | None,
        max_new_tokens: int,
        stop_ids: Iterable[int] = (),
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, the stop token included; the likeliest, or at a temperature above 0 drawn ones.

        vectors (N, P, C): of all images of the prompts, in order, as `project` gives them; they are computed once, and
        may serve many questions. UserError for a prompt that is empty or leaves no room for an answer."""
        rows, stops = len(prompts), set(stop_ids)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max()) if rows else 0
        if not rows or not max_new_tokens:
            return [[] for _ in prompts]
        if not lengths.min():
            raise UserError("a prompt is empty")
        if longest + max_new_tokens > (room := self.config.text.max_length):
            raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {room}")
        tokens = torch.zeros(rows, longest, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = torch.tensor(prompt)
        cache = KVCache(self.language, rows, longest + max_new_tokens)
        uneven = None if int(lengths.min()) == longest else lengths
        states = self(tokens, vectors=vectors, lengths=uneven, cache=cache, hidden=True)
        last = states[torch.arange(rows), lengths - 1]
        found: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(rows))
        for _ in range(max_new_tokens):
            scores = head.logits(self.language, last).float()
            if temperature:
                new = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                new = scores.argmax(-1)
            for i in sorted(open_rows):
                found[i].append(int(new[i]))
            open_rows -= {i for i in open_rows if found[i][-1] in stops}
            if not open_rows or len(found[min(open_rows)]) == max_new_tokens:
                break
            last = self.language(new[:, None], cache=cache, hidden=True)[:, 0]
        return found


def answer_loss(language: Llama, states: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats, scalar fp32) of the targets (B, T) that are not −100, each the token after the one in
    its place. Only their states (B, T, C) meet the head: the table of 49,152 words is large, and few are learned."""
    learned = targets != head.IGNORED
    return head.cross_entropy(language, states[learned], targets[learned])
