"""The losses of BLIP-2: contrast, match and text of the first stage, text behind a prefix in the second.

    ITC   sim(i, j) = max over queries of  v_q(image i) · w(text j) / τ;  cross entropy of rows and of columns
    ITM   pairs, and negatives drawn by ITC's similarity: does this text belong to this image?
    ITG   cross entropy of each token, given the queries and the tokens before it
    LM    the same by a frozen language model, given the projected queries

Rows with the same caption are positives of each other: neither is a negative of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.lm import head
from finetune.lm.llama import Llama

from .model import Stage1, Stage2

IGNORED = -100
LEAST = 1e-4  # added to the weights of negatives, so that there is one in any batch


@dataclass(frozen=True)
class Texts:
    """Captions as tokens: [begin] words [end], padded on the right. group (B,): equal for equal captions."""

    tokens: Tensor  # (B, T) int64
    lengths: Tensor  # (B,)
    group: Tensor  # (B,)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> Texts:
        lengths = self.lengths[rows]
        return Texts(self.tokens[rows][:, : int(lengths.max()) if len(lengths) else 0], lengths, self.group[rows])


def similarities(image: Tensor, text: Tensor) -> Tensor:
    """(B, N): the largest product over the queries, of image (B, Q, D) and text (N, D), vectors of length 1."""
    return torch.einsum("bqd,nd->bqn", image, text).amax(1)


def contrast(sim: Tensor, group: Tensor, temperature: Tensor, smoothing: float = 0.1) -> Tensor:
    """ITC: the mean of both directions' cross entropies of sim (B, B), the positives sharing 1 − smoothing."""
    same = (group[:, None] == group).to(sim.dtype)
    goal = (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / len(sim)
    scores = sim / temperature
    return -((goal * scores.log_softmax(1)).sum(1).mean() + (goal * scores.mT.log_softmax(1)).sum(1).mean()) / 2


@torch.no_grad()
def negatives(sim: Tensor, group: Tensor, temperature: Tensor, hard: bool, generator: torch.Generator) -> Tensor:
    """(B,): for each row of sim (B, B) a column of another caption, by softmax(sim / τ) if `hard`, else uniformly."""
    weights = (sim / temperature).softmax(1) + LEAST if hard else torch.ones_like(sim)
    weights = weights.masked_fill(group[:, None] == group, 0)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)  # a batch of one caption
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def match(
    model: Stage1, image: Tensor, texts: Texts, sim: Tensor, hard: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """ITM: (loss, share of right answers) over B pairs, B images with another text, and B texts with another image."""
    other_text = negatives(sim, texts.group, model.temperature, hard, generator)
    other_image = negatives(sim.mT, texts.group, model.temperature, hard, generator)
    rows = torch.arange(len(texts))
    images = torch.cat([image, image, image[other_image]])
    of = torch.cat([rows, other_text, rows])
    logits = model.matches(images, texts.tokens[of], texts.lengths[of])  # (3 B, 2)
    belongs = texts.group[of] == texts.group[torch.cat([rows, rows, other_image])]
    return F.cross_entropy(logits, belongs.long()), (logits.argmax(1) == belongs).double().mean()


def decoded(texts: Texts, decode: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets), each (B, T): the first token becomes [decode], which says that a text is to be written, and
    each predicts the next one."""
    tokens = texts.tokens.clone()
    tokens[:, 0] = decode
    targets = texts.tokens.roll(-1, 1)
    places = torch.arange(tokens.shape[1])
    return tokens, targets.masked_fill(places >= texts.lengths[:, None] - 1, IGNORED)


def writing(model: Stage1, image: Tensor, texts: Texts, decode: int, smoothing: float = 0.1) -> Tensor:
    """ITG: the mean cross entropy of the captions' tokens, with label smoothing as BERT's head in the paper's code."""
    tokens, targets = decoded(texts, decode)
    logits = model.written(image, tokens, texts.lengths)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)


@dataclass(frozen=True)
class Stage1Losses:
    itc: Tensor
    itm: Tensor
    itg: Tensor
    match_accuracy: Tensor

    @property
    def total(self) -> Tensor:
        return self.itc + self.itm + self.itg


def stage1_losses(
    model: Stage1, image: Tensor, texts: Texts, decode: int, hard: bool, generator: torch.Generator,
    smoothing: float = 0.1,
) -> Stage1Losses:  # fmt: skip
    """The three losses of a batch: image (B, N, image_dim) and its captions."""
    sim = similarities(model.image_vectors(image), model.text_vectors(texts.tokens, texts.lengths))
    itc = contrast(sim, texts.group, model.temperature, smoothing)
    itm, accuracy = match(model, image, texts, sim.detach(), hard, generator)
    return Stage1Losses(itc, itm, writing(model, image, texts, decode, smoothing), accuracy)


def prefix_states(language: Llama, prefix: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, C): the language model's states at the last prefix vector and at all tokens but the last, each of which
    predicts the next token. prefix (B, Q, C), tokens (B, T) padded on the right."""
    words = language.embeddings(tokens[:, :-1])
    embedded = torch.cat([prefix.to(words.dtype), words], 1)  # (B, Q + T − 1, C)
    ids = torch.cat([tokens.new_zeros(prefix.shape[:2]), tokens[:, :-1]], 1)  # of the prefix: not read
    return language(ids, embedded=embedded, hidden=True)[:, prefix.shape[1] - 1 :]


def prefix_loss(model: Stage2, language: Llama, image: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """LM: the mean cross entropy of `targets` (B, T), −100 where there is none, behind the image's queries."""
    states = prefix_states(language, model(image), tokens)
    learned = targets != IGNORED
    return head.cross_entropy(language, states[learned], targets[learned])  # gathered to 2-D first
