"""DQN (Mnih et al. 2015) with double, dueling, n-step and prioritized replay as options; several learners in lockstep.

    L = Huber(Q(s, a) − [r + γⁿ max_a' Q_target(s', a')])       on transitions drawn from a replay buffer, n = 1

    double        Q_target(s', argmax_a' Q(s', a')): one network chooses, the other evaluates (van Hasselt et al. 2015)
    dueling       Q = V + A − mean A (Wang et al. 2016)
    n_step        r is the discounted sum of n rewards, s' the state after them; off-policy without correction
    prioritized   transitions are drawn by their TD error, importance weights correct for it (Schaul et al. 2016)

The file reads in the paper's order: network, collection, update, loop.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.optim import descend
from finetune.rl.agents.learner import Learner
from finetune.rl.agents.networks import Convolutions, Ensemble
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.agents.targets import gather_actions, td_loss, td_target
from finetune.rl.envs.environments import Env, sizes
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.replay import Priorities, Replay, Transitions
from finetune.rl.envs.rollout import Rollout
from finetune.rl.envs.spaces import Image
from finetune.rl.envs.vector import VectorEnv


@dataclass(frozen=True)
class Variant:
    """Which of the four additions are on."""

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


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of every learner; steps are those of one learner."""

    every: int = 8  # environment steps per update
    hidden: int = 64  # width of the two hidden layers
    batch: int = 128
    lr: float = 1e-3  # of Adam, decaying linearly to 0
    gamma: float = 0.99
    reward_scale: float = 0.1  # what the largest reward counts as: the Huber threshold of 1 suits values of about 1
    capacity: int = 50_000  # of the replay buffer; by default it keeps everything, since old exploration still teaches
    warmup: int = 1000  # steps before the first update
    exploration: float = 0.2  # share of all steps in which ε falls from 1 to `epsilon`
    epsilon: float = 0.05
    target_every: int = 25  # updates between two copies to the target network
    beta: float = 0.4  # exponent of the importance weights of prioritized replay, rising to 1


# --- Network

# Divides CartPole's observations: bounds of position and angle, typical velocities. Unscaled, an angle of 0.2 (which
# ends the episode) would hardly show next to a velocity of 2.
OBS_SCALE = [2.4, 2.0, 0.2, 2.0]


def scale_of(env: Env) -> Tensor | list[float] | Image:
    """What divides the observations of an environment: the bounds of a Box that has them; an image as it is."""
    if isinstance(env.observed, Image):
        return env.observed
    if env.name == "CartPole-v1":
        return OBS_SCALE
    scale, space = torch.ones(env.obs_dim), env.observation_space
    if type(space).__name__ == "Box":
        bound = torch.from_numpy(np.maximum(abs(space.low), abs(space.high)).astype(np.float32).ravel())
        scale = torch.where((bound > 0) & (bound < 1e6), bound, scale)
    return scale


class QNetworks(Ensemble):
    """`count` independent networks of Q(s, ·), with or without a dueling head. obs_scale divides the observations; of
    an image there are convolutions instead."""

    obs_scale: Tensor  # (D,)

    def __init__(
        self,
        count: int,
        actions: int,
        hidden: list[int],
        obs_scale: Tensor | list[float] | Image,
        dueling: bool = False,
    ) -> None:
        convolutions = Convolutions(obs_scale, count) if isinstance(obs_scale, Image) else None
        width = convolutions.width if convolutions else len(obs_scale)  # type: ignore[arg-type]
        super().__init__(count, [width, *hidden, actions + dueling])
        self.convolutions, self.dueling = convolutions, dueling
        if not isinstance(obs_scale, Image):
            self.register_buffer("obs_scale", torch.as_tensor(obs_scale), persistent=False)

    def forward(self, observations: Tensor) -> Tensor:
        """(count, N, D) → (count, N, A)"""
        features = self.convolutions(observations) if self.convolutions else observations / self.obs_scale
        outputs = super().forward(features)
        if not self.dueling:
            return outputs
        value, advantages = outputs[..., :1], outputs[..., 1:]
        return value + advantages - advantages.mean(-1, keepdim=True)


@dataclass
class Batch:
    """Transitions (count, batch, …) of each learner, and what prioritized replay needs."""

    transitions: Transitions
    rows: Tensor  # (count, batch) in the replay buffer
    weights: Tensor | None = None  # (count, batch) importance weights


class DQN(Learner[Batch]):
    """`count` independent learners of one variant in lockstep: own environments, transitions and networks, one batched
    product a layer. Environment i belongs to learner i mod `count`. `curve` has their returns (count,) at each
    evaluation."""

    def __init__(self, variant: Variant, envs: VectorEnv, count: int, settings: Settings) -> None:
        self.variant, self.envs, self.count, self.settings = variant, envs, count, settings
        self.actions, width = sizes(envs.envs[0])[1], [settings.hidden, settings.hidden]
        self.q = QNetworks(count, self.actions, width, scale_of(envs.envs[0]), variant.dueling)
        self.target = copy.deepcopy(self.q)
        self.optimizer = torch.optim.Adam(self.q.parameters(), lr=settings.lr, fused=True)
        self.replay = Replay(settings.capacity)
        self.priorities = Priorities(count, settings.capacity) if variant.prioritized else None
        self.reward_size = RewardSize()
        self.epsilon, self.beta = 1.0, settings.beta
        self.updates = 0
        self.curve: list[Tensor] = []

    # --- Collection

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Tensor:
        """Greedy actions (N,) for the observations (N, D) of all learners' environments."""
        rows = observations.unflatten(0, (-1, self.count)).transpose(0, 1)  # (count, N / count, D)
        return self.q(rows).argmax(-1).T.flatten()

    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        """ε-greedy actions (N,)."""
        greedy = self.greedy(observations)
        random = torch.randint(self.actions, greedy.shape, generator=rng)
        return torch.where(torch.rand(greedy.shape, generator=rng) < self.epsilon, random, greedy)

    def remember(self, rollout: Rollout) -> None:
        """Appends to the replay buffer. Each of its rows holds a transition of every learner."""
        old_size = self.reward_size.size
        size = self.reward_size.see(rollout.rewards)
        if self.replay.rows is not None and size != old_size:
            self.replay.rows.rewards *= old_size / size
        rollout.rewards = rollout.rewards / size * self.settings.reward_scale
        new = Transitions.n_step(rollout, self.variant.n, self.settings.gamma)
        rows = self.replay.add(Transitions(*(column.unflatten(0, (-1, self.count)) for column in new.columns())))
        if self.priorities is not None:
            self.priorities.add(rows)

    # --- Update

    def sample(self, rng: torch.Generator) -> Batch:
        """A batch of each learner's own transitions, uniform or by priority."""
        weights = None
        if self.priorities is not None:
            rows, weights = self.priorities.sample(self.settings.batch, self.beta, rng)
        else:
            rows = torch.randint(len(self.replay), (self.count, self.settings.batch), generator=rng)
        assert self.replay.rows is not None
        flat = (rows * self.count + torch.arange(self.count)[:, None]).flatten()  # one index is faster than two
        columns = (column.flatten(0, 1).index_select(0, flat) for column in self.replay.rows.columns())
        return Batch(Transitions(*(column.unflatten(0, rows.shape) for column in columns)), rows, weights)

    @torch.no_grad()
    def targets(self, batch: Transitions) -> Tensor:
        """r + γⁿ Q_target(s', a') (count, batch). a' is the target network's greedy action; with double DQN, Q's."""
        assert batch.steps is not None
        next_q = self.target(batch.next_observations)
        chooser = self.q(batch.next_observations) if self.variant.double else next_q
        next_values = gather_actions(next_q, chooser.argmax(-1))
        return td_target(batch.rewards, next_values, batch.terminated, self.settings.gamma**batch.steps)

    def update(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """One Adam step of every learner; a copy to the target networks when it is due."""
        q = gather_actions(self.q(batch.transitions.observations), batch.transitions.actions)
        target = self.targets(batch.transitions)
        loss = td_loss(q, target, batch.weights)
        descend(self.count * loss, self.optimizer)  # times count: the loss is a mean over learners as well
        if self.priorities is not None:
            self.priorities.update(batch.rows, target - q.detach())
        self.updates += 1
        if self.updates % self.settings.target_every == 0:
            self.target.load_state_dict(self.q.state_dict())
        return {"loss": loss.detach()}

    # --- Loop

    def train(self, steps: int, begin: float, end: float, rate: float, rng: torch.Generator) -> None:
        """About `steps` steps of each learner, in rounds of `every` steps and one update per environment. They are the
        part from `begin` to `end` of the whole training, which sets ε, β and the learning rate, times `rate`."""
        s, envs_each = self.settings, len(self.envs) // self.count
        rounds = max(1, steps // (envs_each * s.every))
        for i in range(rounds):
            progress = begin + (end - begin) * i / rounds
            self.epsilon = max(s.epsilon, 1 - (1 - s.epsilon) * progress / s.exploration)
            self.remember(self.envs.collect(lambda observations: self.act(observations, rng), s.every))
            if self.replay.added >= s.warmup:
                self.beta = s.beta + (1 - s.beta) * progress
                self.optimizer.param_groups[0]["lr"] = rate * s.lr * (1 - progress)
                for _ in range(envs_each):
                    self.update(self.sample(rng), rng)

    def evaluate(self, envs: Sequence[Env], seeds: Sequence[int]) -> Tensor:
        """Mean returns (count,) of the greedy policies, one episode for each of the environments."""
        return torch.tensor(returns(envs, self.greedy, seeds)).unflatten(0, (-1, self.count)).mean(0)

    @property
    def state(self) -> dict[str, Any]:
        names = ("q", "target", "optimizer", "replay", "envs", "priorities", "reward_size")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def state_dict(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self.state.items()}
        return parts | {"updates": self.updates, "curve": self.curve}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.state.items():
            part.load_state_dict(state[name])
        self.updates, self.curve = state["updates"], state["curve"]
