"""SAC and TD3: one environment, a replay, and an update for each step of it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from finetune.optim import descend
from finetune.rl.agents import networks, targets
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.agents.targets import critic_loss, polyak_, td_target
from finetune.rl.envs import environments
from finetune.rl.envs.replay import Replay, Transitions
from finetune.rl.envs.vector import VectorEnv

LARGEST = 16.0  # as which the largest reward counts: beside it SAC's first α of 1 is small, and learning rates hold


class OffPolicy:
    """What SAC and TD3 share: critics with a slow copy, the replay, and the loop of steps."""

    policy: Any

    def __init__(self, cfg: Any, method: str, vector: VectorEnv) -> None:
        self.cfg, self.vector = cfg, vector
        self.low, self.high = environments.action_bounds(vector.envs[0])
        self.seen = vector.observations.shape[1]
        self.hidden = [cfg.continuous_hidden] * 2
        self.policy = self.make_policy()
        self.q = networks.TwinQ(self.seen, len(self.low), self.hidden, cfg.critics)
        self.slow_q = copy.deepcopy(self.q)
        self.replay = Replay(cfg.capacity)
        self.policy_optimizer, self.q_optimizer = (
            torch.optim.Adam(m.parameters(), lr=0.0, fused=True) for m in (self.policy, self.q)
        )
        self.updates = {"count": 0}
        self.rewards = RewardSize()

    @property
    def unit(self) -> float:
        """What 1 of the critics' unit is in the environment's."""
        return self.rewards.size / LARGEST

    def state(self) -> dict[str, Any]:
        names = ("policy", "q", "slow_q", "replay", "policy_optimizer", "q_optimizer", "updates", "vector", "rewards")
        return {name: getattr(self, name) for name in names}

    def chunk(self, steps: int, lr: float, generator: torch.Generator) -> dict[str, float]:
        """About `steps` steps of the environments and as many updates; lr: a part of the learning rate. Means of the
        updates' figures; before the first one there are none."""
        for optimizer in (self.policy_optimizer, self.q_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = lr * self.cfg.continuous_lr
        found: list[dict[str, Tensor]] = []
        for _ in range(round(steps / len(self.vector))):
            seen = torch.from_numpy(self.vector.observations)
            if self.replay.added < self.cfg.warmup:
                uniform = torch.rand(len(self.vector), len(self.low), generator=generator)
                actions = self.low + (self.high - self.low) * uniform
            else:
                actions = self.acting(generator)(seen)
            rewards, reached, terminated, _ = map(torch.from_numpy, self.vector.step(actions))
            self.rewards.see(rewards)
            self.replay.add(Transitions(seen, actions, rewards, reached, terminated))
            if self.replay.added >= self.cfg.warmup:
                batch = self.replay.sample(self.cfg.batch, generator)
                batch.rewards = batch.rewards / self.unit
                if self.cfg.shuffle:
                    batch.rewards = batch.rewards[torch.randperm(len(batch), generator=generator)]
                found.append(self.update(batch, generator))
                self.updates["count"] += 1
        names = dict.fromkeys(name for f in found for name in f)
        return {name: float(torch.stack([f[name] for f in found if name in f]).mean()) for name in names}

    def improve_q(self, batch: Transitions, target: Tensor) -> dict[str, Tensor]:
        q = self.q(batch.observations, batch.actions)
        loss = critic_loss(q, target)
        descend(loss, self.q_optimizer)
        return {"q_loss": loss.detach(), "q": self.unit * q.detach().mean()}

    def acting(self, generator: torch.Generator) -> environments.Act:
        def act(observations: Tensor) -> Tensor:
            with torch.no_grad():
                return self.explore(observations, generator)

        return act

    def tried(self, generator: torch.Generator) -> environments.Act:
        """What is evaluated: the policy without its noise."""
        return self.best

    valued = tried  # the policy that the critic is the value of
    bonus: Any = None  # to the rewards, in the critic's values

    def values(self, observations: Tensor) -> Tensor:
        """What the critics say of the best action."""
        return self.unit * self.q(observations, self.best(observations)).amin(0)

    def noise(self, rows: int, generator: torch.Generator) -> Tensor:
        return torch.randn(rows, len(self.low), generator=generator)

    def make_policy(self) -> nn.Module:
        raise NotImplementedError

    def explore(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def best(self, observations: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, batch: Transitions, generator: torch.Generator) -> dict[str, Tensor]:
        raise NotImplementedError


class SAC(OffPolicy):
    """Maximizes E[Σ γ^t (r + α H)], with α such that the entropy H meets its target."""

    def __init__(self, cfg: Any, method: str, vector: VectorEnv) -> None:
        super().__init__(cfg, method, vector)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(cfg.alpha or 1.0)))
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=cfg.continuous_lr, fused=True)

    def state(self) -> dict[str, Any]:
        return super().state() | {"alpha": {"log": self.log_alpha}, "alpha_optimizer": self.alpha_optimizer}

    def make_policy(self) -> nn.Module:
        return networks.SquashedGaussian(self.seen, self.hidden, self.low, self.high)

    def explore(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        return self.policy.rsample(self.policy(observations), self.noise(len(observations), generator))[0]

    @torch.no_grad()
    def best(self, observations: Tensor) -> Tensor:
        return self.policy.mode(self.policy(observations))

    def valued(self, generator: torch.Generator) -> environments.Act:
        return self.acting(generator)

    @torch.no_grad()
    def values(self, observations: Tensor, draws: int = 16) -> Tensor:
        """(N,) the soft value E[Q(s, a) − α log π(a|s)], from so many actions of each state."""
        many, generator = observations.repeat(draws, 1), torch.Generator().manual_seed(0)
        actions, log_probs = self.policy.rsample(self.policy(many), self.noise(len(many), generator))
        soft = targets.soft_value(self.q(many, actions), log_probs, self.log_alpha.exp())
        return self.unit * soft.view(draws, -1).mean(0)

    @torch.no_grad()
    def bonus(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """(T, N) of states (T, N, D): −α log π of an action drawn there, on average α times the entropy."""
        flat = observations.flatten(0, 1)
        _, log_probs = self.policy.rsample(self.policy(flat), self.noise(len(flat), generator))
        return -self.unit * self.log_alpha.exp() * log_probs.view(observations.shape[:2])

    def update(self, batch: Transitions, generator: torch.Generator) -> dict[str, Tensor]:
        policy, alpha = self.policy, self.log_alpha.detach().exp()
        with torch.no_grad():
            actions, log_probs = policy.rsample(policy(batch.next_observations), self.noise(len(batch), generator))
            after = targets.soft_value(self.slow_q(batch.next_observations, actions), log_probs, alpha)
        figures = self.improve_q(batch, td_target(batch.rewards, after, batch.terminated, self.cfg.gamma))

        actions, log_probs = policy.rsample(policy(batch.observations), self.noise(len(batch), generator))
        loss = targets.sac_policy_loss(self.q(batch.observations, actions), log_probs, alpha)
        descend(loss, self.policy_optimizer)
        if self.cfg.alpha is None:
            descend(targets.temperature_loss(self.log_alpha, log_probs, policy.target_entropy), self.alpha_optimizer)
        polyak_(self.slow_q, self.q, self.cfg.tau)
        return figures | {"policy_loss": loss.detach(), "alpha": alpha, "entropy": -log_probs.detach().mean()}


class TD3(OffPolicy):
    """Maximizes Q₁(s, π(s)). With one critic, no delay and no target noise it is DDPG."""

    def __init__(self, cfg: Any, method: str, vector: VectorEnv) -> None:
        super().__init__(cfg, method, vector)
        self.slow_policy = copy.deepcopy(self.policy)

    def state(self) -> dict[str, Any]:
        return super().state() | {"slow_policy": self.slow_policy}

    def make_policy(self) -> nn.Module:
        return networks.Deterministic(self.seen, self.hidden, self.low, self.high)

    def explore(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        noise = self.cfg.exploration * self.policy.scale * self.noise(len(observations), generator)
        return torch.clamp(self.policy(observations) + noise, self.low, self.high)

    @torch.no_grad()
    def best(self, observations: Tensor) -> Tensor:
        return self.policy(observations)

    def update(self, batch: Transitions, generator: torch.Generator) -> dict[str, Tensor]:
        cfg = self.cfg
        with torch.no_grad():
            noise = cfg.target_noise * self.policy.scale * self.noise(len(batch), generator)
            actions = targets.smoothed_actions(
                self.slow_policy(batch.next_observations),
                noise,
                cfg.noise_clip * self.policy.scale,
                self.low,
                self.high,
            )
            after = self.slow_q(batch.next_observations, actions).amin(0)
        figures = self.improve_q(batch, td_target(batch.rewards, after, batch.terminated, cfg.gamma))
        if self.updates["count"] % cfg.policy_delay == 0:
            loss = targets.td3_policy_loss(self.q(batch.observations, self.policy(batch.observations)))
            descend(loss, self.policy_optimizer)
            polyak_(self.slow_q, self.q, cfg.tau)
            polyak_(self.slow_policy, self.policy, cfg.tau)
            figures["policy_loss"] = loss.detach()
        return figures


LEARNERS = {"sac": SAC, "td3": TD3}
