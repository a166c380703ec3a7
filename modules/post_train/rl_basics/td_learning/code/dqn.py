"""Q-learning with a network: DQN (Mnih et al. 2015) and what was added to it, independent learners side by side.

    loss = Huber(Q(s, a) − [r + γⁿ max_a' Q_target(s', a')])       on steps drawn from a replay, n = 1

A reward r stands for the n discounted ones. Every part can be switched on by itself:

    double        the network chooses a', the target network values it (van Hasselt et al. 2015)
    dueling       Q = V + A − mean A (Wang et al. 2016)
    n_step        several rewards before the estimate (Sutton 1988); without correction for what has changed since
    prioritized   steps are drawn by their TD error, and weighted by how much too often (Schaul et al. 2016)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.optim import descend
from finetune.rl.agents.networks import QNetworks
from finetune.rl.agents.targets import double_dqn_target, dqn_target, gather_actions, td_loss
from finetune.rl.envs.environments import sizes
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.replay import Priorities, Replay, Transitions
from finetune.rl.envs.rollout import Rollout
from finetune.rl.envs.vector import VectorEnv


@dataclass(frozen=True)
class Variant:
    double: bool = False
    dueling: bool = False
    prioritized: bool = False
    n: int = 1


VARIANTS = {
    "dqn": Variant(),
    "double": Variant(double=True),
    "dueling": Variant(dueling=True),
    "prioritized": Variant(prioritized=True),
    "n_step": Variant(n=5),
    "all": Variant(double=True, dueling=True, prioritized=True, n=5),
}
# CartPole's numbers are divided by about their size while the pole stands: where an episode ends, and two a second.
SIZE = [2.4, 2.0, 0.2, 2.0]


@dataclass(frozen=True)
class Settings:
    """Of all learners. Steps are those of each learner."""

    every: int = 8  # steps for one update
    hidden: int = 64  # width of the two hidden layers
    batch: int = 128
    lr: float = 1e-3  # Adam's, falling to 0
    gamma: float = 0.99
    reward_scale: float = 0.1  # rewards are multiplied by it: Huber's threshold is for values of about one
    capacity: int = 50_000  # steps that are kept: by default all, as what is forgotten is exploration
    warmup: int = 1000  # before anything is learned
    exploration: float = 0.2  # share of all steps in which ε falls from 1 to `epsilon`
    epsilon: float = 0.05
    target_every: int = 25  # updates between two copies to the target network
    beta: float = 0.4  # of prioritized replay, rising to 1


class DQN:
    """`count` learners of one variant, each with its own environments, steps and networks. What they know is in the
    state_dict; `curve` has what they were worth when they were judged, (count,) each."""

    def __init__(self, variant: Variant, envs: VectorEnv, count: int, settings: Settings) -> None:
        self.variant, self.envs, self.count, self.settings = variant, envs, count, settings
        self.actions, width = sizes(envs.envs[0])[1], [settings.hidden, settings.hidden]
        self.q = QNetworks(count, self.actions, width, SIZE, variant.dueling)
        self.target = copy.deepcopy(self.q)
        self.optimizer = torch.optim.Adam(self.q.parameters(), lr=settings.lr, fused=True)
        self.replay = Replay(settings.capacity)
        self.priorities = Priorities(count, settings.capacity) if variant.prioritized else None
        self.updates = 0
        self.curve: list[Tensor] = []

    # Acting. Environment i belongs to learner i mod count.

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Tensor:
        """(N, D) of all learners' environments → (N,), each by its own network."""
        rows = observations.unflatten(0, (-1, self.count)).transpose(0, 1)  # (count, N / count, D)
        return self.q(rows).argmax(-1).T.flatten()

    def explore(self, observations: Tensor, epsilon: float, draw: torch.Generator) -> Tensor:
        best = self.greedy(observations)
        random = torch.randint(self.actions, best.shape, generator=draw)
        return torch.where(torch.rand(best.shape, generator=draw) < epsilon, random, best)

    # Learning

    def learn(self, steps: int, begin: float, end: float, rate: float, draw: torch.Generator) -> float:
        """About `steps` steps of each learner, in whole rounds with an update for each environment; the mean loss. They
        are the part from `begin` to `end` of all that will be; `rate` multiplies the learning rate."""
        s, each, losses = self.settings, len(self.envs) // self.count, []
        rounds = max(1, steps // (each * s.every))
        for i in range(rounds):
            progress = begin + (end - begin) * i / rounds
            epsilon = max(s.epsilon, 1 - (1 - s.epsilon) * progress / s.exploration)
            self.remember(self.envs.collect(lambda x, e=epsilon: self.explore(x, e, draw), s.every))  # type: ignore[misc]
            if self.replay.added >= s.warmup:
                self.optimizer.param_groups[0]["lr"] = rate * s.lr * (1 - progress)
                losses += [self.update(s.beta + (1 - s.beta) * progress, draw) for _ in range(each)]
        return sum(losses) / max(1, len(losses))

    def remember(self, rollout: Rollout) -> None:
        """A row of the replay holds a step of every learner."""
        rollout.rewards = self.settings.reward_scale * rollout.rewards
        new = Transitions.n_step(rollout, self.variant.n, self.settings.gamma)
        rows = self.replay.add(Transitions(*(column.unflatten(0, (-1, self.count)) for column in new.columns())))
        if self.priorities is not None:
            self.priorities.add(rows)

    def update(self, beta: float, draw: torch.Generator) -> float:
        """One step of Adam on a batch of each learner; the mean loss."""
        if self.priorities is not None:
            rows, weights = self.priorities.sample(self.settings.batch, beta, draw)
        else:
            rows = torch.randint(len(self.replay), (self.count, self.settings.batch), generator=draw)
            weights = None
        batch = self.recall(rows)
        q, wanted = gather_actions(self.q(batch.observations), batch.actions), self.targets(batch)
        loss = td_loss(q, wanted, weights)
        descend(self.count * loss, self.optimizer)  # each learner by the mean of its own batch
        if self.priorities is not None:
            self.priorities.update(rows, wanted - q.detach())
        self.updates += 1
        if self.updates % self.settings.target_every == 0:
            self.target.load_state_dict(self.q.state_dict())
        return loss.item()

    def recall(self, rows: Tensor) -> Transitions:
        """Rows (count, batch) of each learner's own steps: (count, batch, …)."""
        assert self.replay.rows is not None
        flat = (rows * self.count + torch.arange(self.count)[:, None]).flatten()  # one index is faster than two
        columns = (column.flatten(0, 1).index_select(0, flat) for column in self.replay.rows.columns())
        return Transitions(*(column.unflatten(0, rows.shape) for column in columns))

    @torch.no_grad()
    def targets(self, batch: Transitions) -> Tensor:
        """(count, batch)"""
        assert batch.steps is not None
        after, gamma = self.target(batch.next_observations), self.settings.gamma**batch.steps
        if self.variant.double:
            online = self.q(batch.next_observations)
            return double_dqn_target(online, after, batch.rewards, batch.terminated, gamma)
        return dqn_target(after, batch.rewards, batch.terminated, gamma)

    # Judging, and going on

    def judge(self, envs: Sequence[Any], seeds: Sequence[int]) -> Tensor:
        """Mean return (count,) of the greedy policies, with as many episodes each as there are environments for."""
        return torch.tensor(returns(envs, self.greedy, seeds)).unflatten(0, (-1, self.count)).mean(0)

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("q", "target", "optimizer", "replay", "envs", "priorities")}
        saved = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return saved | {"updates": self.updates, "curve": self.curve}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            if name in ("updates", "curve"):
                setattr(self, name, saved)
            else:
                getattr(self, name).load_state_dict(saved)
