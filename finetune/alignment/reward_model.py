"""A language model with a number for a head: the reward of an answer, or the value of each of its beginnings.

    r(x, y) = w · h        h: the state after the last norm, at the answer's last token or averaged over its tokens

Trained on pairs, w (chosen) and l (rejected), by the model of Bradley and Terry (1952), as Christiano et al. 2017
(arXiv:1706.03741) and InstructGPT (arXiv:2203.02155, eq. 1) do:

    loss = −log σ(r(w) − r(l) − margin) + centering · (r(w) + r(l))²

The margin is Llama 2's (arXiv:2307.09288, §3.2.2). A loss of differences leaves r's zero open; the second term
(Eisenstein et al. 2023, arXiv:2312.09244) puts it in the middle.

Several heads on one model are an ensemble: their spread tells where the reward is a guess (Coste et al. 2023,
arXiv:2310.02743), and the mean minus some of it resists exploitation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.alignment.logprobs import lengths, owners
from finetune.data.packing import IGNORE, Batch
from finetune.errors import UserError
from finetune.lm.gpt import GPT
from finetune.lm.io import weights
from finetune.lm.llama import Llama
from finetune.runs import checkpoint

Pooling = Literal["last", "mean"]
FILE = "reward.safetensors"


class ScoreHead(nn.Module):
    """`heads` numbers of each state, in fp32. The weights begin small (TRL and InstructGPT: N(0, 1 / (C + 1))), so that
    the first rewards are near 0."""

    def __init__(self, dim: int, heads: int = 1, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, dim, generator=generator) / (dim + 1))

    def forward(self, states: Tensor) -> Tensor:
        """(…, C) → (…, heads)."""
        return F.linear(states.float(), self.weight)


class RewardModel(nn.Module):
    """A language model and a head. `pooling`: the state that the head sees. `heads` > 1: an ensemble."""

    def __init__(
        self,
        model: Llama | GPT,
        pooling: Pooling = "mean",
        heads: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        self.head = ScoreHead(model.config.dim, heads, generator)

    def forward(self, batch: Batch) -> Tensor:
        """(N, heads): the rewards of the documents of a batch. An answer begins where the first token is learned."""
        states = self.model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens, hidden=True)[0]
        if self.pooling == "last":
            return self.head(states[batch.cu_seqlens[1:].long() - 1])
        # targets[t] is token t + 1: the state at a learned token is one place further.
        places = torch.nonzero(batch.targets[0] != IGNORE)[:, 0] + 1
        sums = states.new_zeros(len(batch.cu_seqlens) - 1, states.shape[1], dtype=torch.float32)
        sums = sums.index_add(0, owners(batch), states[places].float())
        return self.head(sums / lengths(batch)[:, None])

    @torch.no_grad()
    def score(self, batch: Batch, caution: float = 0.0) -> Tensor:
        """(N,): the mean over the heads minus `caution` of their standard deviations."""
        rewards = self(batch)
        mean = rewards.mean(1)
        return mean - caution * rewards.std(1) if rewards.shape[1] > 1 else mean

    def save(self, folder: Path) -> None:
        """The head, next to the files of the model or of its adapter."""
        checkpoint.write_tensors(folder / FILE, {f"score.{self.pooling}": self.head.weight.detach()})

    def load(self, folder: Path) -> None:
        """The head of a folder, and how it was pooled; UserError if it has none, or one of another size."""
        tensors = dict(weights.read_safetensors(folder, FILE))
        for pooling in get_args(Pooling):
            weight = tensors.get(f"score.{pooling}")
            if weight is not None and weight.dim() == 2 and weight.shape[1] == self.head.weight.shape[1]:
                self.pooling, self.head.weight = pooling, nn.Parameter(weight.float())
                return
        raise UserError(
            f"{folder / FILE} is not the head of a reward model of {self.head.weight.shape[1]} numbers a state"
        )


class ValueModel(nn.Module):
    """The value of each beginning of an answer: a language model, or the states of a policy that shares its own.

    V(s_t) is read at the token before answer token t, the state that the policy chooses token t by."""

    def __init__(self, model: Llama | GPT, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = ScoreHead(model.config.dim, 1, generator)

    def forward(self, batch: Batch) -> Tensor:
        """(n,): the values before the learned tokens, in order."""
        states = self.model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens, hidden=True)[0]
        return self.of(states, batch)

    def of(self, states: Tensor, batch: Batch) -> Tensor:
        """The same of given states (T, C), as of the policy's own forward pass."""
        return self.head(states[batch.targets[0] != IGNORE])[:, 0]

    def begin_from(self, reward: RewardModel) -> None:
        """The head of a reward model, whose states this model then has to share (InstructGPT, §3.5): the value of a
        whole answer is its reward."""
        with torch.no_grad():
            self.head.weight.copy_(reward.head.weight.mean(0, keepdim=True))


def pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centering: float = 0.0) -> Tensor:
    """The mean loss of pairs of rewards (…,); `margin`: of each pair, where people said how much better."""
    loss = -F.logsigmoid(chosen - rejected - margin)
    return (loss + centering * (chosen + rejected).square()).mean()


def calibration(margins: Tensor, bins: int = 10) -> list[tuple[float, float, int]]:
    """How far the probabilities that a reward model gives are right: of pairs with margins r(a) − r(b) ≥ 0 where a is
    the answer it prefers, signed by whether people preferred a too, (mean predicted probability, share right, pairs)
    in bins of equal width between 1/2 and 1. Empty bins are omitted."""
    predicted = torch.sigmoid(margins.abs())
    right = margins > 0
    place = ((predicted - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    found = []
    for i in range(bins):
        inside = place == i
        if count := int(inside.sum()):
            found.append((predicted[inside].mean().item(), right[inside].float().mean().item(), count))
    return found
