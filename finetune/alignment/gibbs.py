"""A problem so small that the best policy is known: all its sequences can be counted.

Learning from rewards or preferences with a KL penalty (Ziegler et al. 2019, arXiv:1909.08593; Rafailov et al. 2023,
arXiv:2305.18290, eq. 3) asks for the policy π that maximizes

    J(π) = E_π[r(y)] − β · KL(π ‖ π_ref)

Its solution is a Gibbs distribution (Rafailov et al., eq. 4):

    π*(y) = π_ref(y) · exp(r(y) / β) / Z,    J(π*) − J(π) = β · KL(π ‖ π*),    J(π*) = β · log Z

For a language model Z is a sum over all texts, which nobody can compute. Here there are a few dozen sequences, so that
Z, π* and every expectation are exact sums, and KL(π ‖ π*) tells how far a method ends from where theory says it must:

    problem = Problem.random(generator)
    policy = problem.policy()                                  # starts as π_ref
    … train it with any loss …
    kl(policy.sequence_logprobs(), problem.optimum(beta))      # 0 for the solution
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sequences:
    """All sequences of at most `length` tokens: with an end token those that it ends and those that are cut, without
    one all of exactly `length`. S of them, over N different beginnings (nodes), from 0, the empty one."""

    tokens: Tensor  # (S, L) int64; 0 behind the end
    mask: Tensor  # (S, L) bool: the sequence's tokens, the end token included
    nodes: Tensor  # (S, L) int64: the beginning that each token follows
    count: int  # N

    @classmethod
    def all(cls, vocabulary: int, length: int, end: int | None = None) -> Sequences:
        """Enumerates them in the order of their tokens."""
        tokens: list[list[int]] = []
        nodes: list[list[int]] = []
        count = 0

        def grow(beginning: list[int], passed: list[int]) -> None:
            nonlocal count
            node, count = count, count + 1
            for token in range(vocabulary):
                sequence, through = [*beginning, token], [*passed, node]
                if token == end or len(sequence) == length:
                    tokens.append(sequence + [0] * (length - len(sequence)))
                    nodes.append(through + [0] * (length - len(through)))
                    lengths.append(len(sequence))
                else:
                    grow(sequence, through)

        lengths: list[int] = []
        grow([], [])
        mask = torch.arange(length) < torch.tensor(lengths)[:, None]
        return cls(torch.tensor(tokens), mask, torch.tensor(nodes), count)


class Policy(nn.Module):
    """A softmax over the next token for each beginning: an autoregressive model with a table for a network.

    With it every distribution over the sequences can be had, so that a method that misses π* has only its loss to
    blame."""

    def __init__(self, sequences: Sequences, logits: Tensor) -> None:
        """logits (N, V) float64: copied."""
        super().__init__()
        self.sequences = sequences
        self.logits = nn.Parameter(logits.detach().clone())

    def token_logprobs(self, rows: Tensor | None = None) -> Tensor:
        """(S, L), or (B, L) of the sequences `rows`: of each token given those before it; 0 behind the end."""
        which = slice(None) if rows is None else rows
        all_of = self.logits.log_softmax(-1)  # (N, V)
        found = all_of[self.sequences.nodes[which], self.sequences.tokens[which]]
        return found * self.sequences.mask[which]

    def sequence_logprobs(self, rows: Tensor | None = None) -> Tensor:
        """(S,) or (B,): log π(y)."""
        return self.token_logprobs(rows).sum(-1)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) int64: indices of sequences."""
        return torch.multinomial(self.sequence_logprobs().exp(), count, replacement=True, generator=generator)


@dataclass(frozen=True)
class Problem:
    """Sequences, a reference policy and a reward for each sequence, in float64."""

    sequences: Sequences
    reference_logits: Tensor  # (N, V)
    rewards: Tensor  # (S,)

    @classmethod
    def random(
        cls,
        generator: torch.Generator,
        vocabulary: int = 6,
        length: int = 2,
        end: int | None = None,
        spread: float = 1.0,
    ) -> Problem:
        """Normal logits and rewards of standard deviation 1 and `spread`."""
        sequences = Sequences.all(vocabulary, length, end)
        logits = torch.randn(sequences.count, vocabulary, generator=generator, dtype=torch.float64)
        rewards = torch.randn(len(sequences.tokens), generator=generator, dtype=torch.float64) * spread
        return cls(sequences, logits, rewards)

    def policy(self) -> Policy:
        """A policy that begins as the reference."""
        return Policy(self.sequences, self.reference_logits)

    @property
    def reference_logprobs(self) -> Tensor:
        """(S,): log π_ref(y)."""
        return self.policy().sequence_logprobs().detach()

    def optimum(self, beta: float) -> Tensor:
        """(S,): log π*(y)."""
        return (self.reference_logprobs + self.rewards / beta).log_softmax(-1)

    def objective(self, logprobs: Tensor, beta: float) -> Tensor:
        """J(π) of log π (S,), exactly; with gradients it is what policy gradients estimate."""
        return expectation(logprobs, self.rewards) - beta * kl(logprobs, self.reference_logprobs)

    def preferences(self, count: int, generator: torch.Generator, flipped: float = 0.0) -> tuple[Tensor, Tensor]:
        """(chosen, rejected): indices (≤ count,) of pairs drawn from π_ref and ordered by Bradley and Terry (1952),
        P(a ≻ b) = σ(r(a) − r(b)), of which the share `flipped` is then turned round. Pairs of the same are dropped."""
        reference = self.policy()
        a, b = (reference.sample(count, generator) for _ in range(2))
        a, b = a[a != b], b[a != b]
        wins = torch.rand(len(a), generator=generator, dtype=torch.float64) < torch.sigmoid(
            self.rewards[a] - self.rewards[b]
        )
        wins ^= torch.rand(len(a), generator=generator) < flipped
        return torch.where(wins, a, b), torch.where(wins, b, a)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of log-probabilities (S,) over the same sequences."""
    return expectation(p, p - q)


def expectation(logprobs: Tensor, values: Tensor) -> Tensor:
    """Σ_y p(y) · values(y)."""
    return (logprobs.exp() * values).sum(-1)
