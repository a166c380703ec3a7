"""Learners from logged steps with continuous actions, scaled to −1 … 1: BCQ, and what it is compared with."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from finetune.optim import descend
from finetune.rl.agents.networks import Deterministic, Gaussian, TwinQ, Value
from finetune.rl.agents.offline import cloning_loss
from finetune.rl.agents.targets import critic_loss, polyak_, smoothed_actions, td3_policy_loss, td_target
from finetune.rl.envs.replay import Transitions

from . import losses
from .generator import CVAE, Perturbation, candidates


class Learner:
    """Twin critics with their target, and what `act` needs; an optimizer for each part that has a loss of its own."""

    def __init__(self, cfg, observations: int, actions: int) -> None:
        self.cfg, self.sizes, self.hidden = cfg, (observations, actions), [cfg.hidden, cfg.hidden]
        self.high = torch.ones(actions)
        self.networks: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.critic = self.trained("critic", TwinQ(observations, actions, self.hidden))
        self.critic_target = self.target_of("critic")

    def trained(self, name: str, network: Any) -> Any:
        self.networks[name] = network
        self.optimizers[name] = torch.optim.Adam(network.parameters(), lr=self.cfg.lr, fused=True)
        return network

    def target_of(self, name: str) -> Any:
        self.networks[f"{name}_target"] = copy.deepcopy(self.networks[name]).requires_grad_(False)
        return self.networks[f"{name}_target"]

    def step(self, name: str, loss: Tensor) -> Tensor:
        """Descends in the named part alone: an actor's loss has gradients in the critic too."""
        descend(loss, self.optimizers[name])
        return loss.detach()

    def follow(self, *names: str) -> None:
        for name in names:
            polyak_(self.networks[f"{name}_target"], self.networks[name], self.cfg.polyak)

    def fit_critic(self, batch: Transitions, after: Tensor) -> dict[str, Tensor]:
        """`after` (N,): what the next state is worth."""
        q = self.critic(batch.observations, batch.actions)
        targets = td_target(batch.rewards, after, batch.terminated, self.cfg.gamma)
        return {"critic_loss": self.step("critic", critic_loss(q, targets))}

    def update(self, batch: Transitions, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        raise NotImplementedError

    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.critic(observations, actions).mean(0)

    def state(self) -> dict[str, Any]:
        return self.networks | {f"{name}_optimizer": optimizer for name, optimizer in self.optimizers.items()}


class Cloning:
    """Behavior cloning: the mean of the logged actions."""

    def __init__(self, cfg, observations: int, actions: int) -> None:
        high = torch.ones(actions)
        self.actor = Deterministic(observations, [cfg.hidden, cfg.hidden], -high, high)
        self.optimizer = torch.optim.Adam(self.actor.parameters(), lr=cfg.lr, fused=True)

    def update(self, batch: Transitions, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        loss = cloning_loss(self.actor(batch.observations), batch.actions)
        descend(loss, self.optimizer)
        return {"imitation_loss": loss.detach()}

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        return self.actor(observations)

    def value(self, observations: Tensor, actions: Tensor) -> None:
        """It has none."""

    def state(self) -> dict[str, Any]:
        return {"actor": self.actor, "optimizer": self.optimizer}


class BCQ(Learner):
    def __init__(self, cfg, observations: int, actions: int) -> None:
        super().__init__(cfg, observations, actions)
        self.cvae = self.trained("cvae", CVAE(observations, actions, cfg.hidden))
        self.perturbation = self.trained("perturbation", Perturbation(observations, actions, cfg.hidden, cfg.phi))
        self.perturbation_target = self.target_of("perturbation")

    def update(self, batch: Transitions, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        mean, log_deviation = self.cvae.encode(batch.observations, batch.actions)
        z = mean + log_deviation.exp() * torch.randn(mean.shape, generator=generator)
        decoded = self.cvae.decode(batch.observations, z)
        found = {
            "vae_loss": self.step("cvae", losses.vae_loss(batch.actions, decoded, mean, log_deviation, self.cfg.kl))
        }

        found |= self.fit_critic(batch, self.after(batch.next_observations, generator))

        with torch.no_grad():
            proposed = self.cvae.propose(batch.observations, 1, generator)[:, 0]
        moved = self.perturbation(batch.observations, proposed)
        found["actor_loss"] = self.step("perturbation", td3_policy_loss(self.critic(batch.observations, moved)))
        self.follow("critic", "perturbation")
        return found

    @torch.no_grad()
    def after(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """max over the candidates of λ min Q' + (1 − λ) max Q'"""
        actions = candidates(self.cvae, self.perturbation_target, observations, self.cfg.candidates, generator)
        return losses.best_candidate(self.critic_target(observations[:, None], actions), self.cfg.lam)

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Of many candidates the one that the first critic likes best."""
        actions = candidates(self.cvae, self.perturbation, observations, self.cfg.act_candidates, generator)
        best = self.critic(observations[:, None], actions)[0].argmax(-1)
        return actions[torch.arange(len(actions)), best]


class TD3(Learner):
    """TD3 on logged steps as if they were its own: the naive way."""

    def __init__(self, cfg, observations: int, actions: int) -> None:
        super().__init__(cfg, observations, actions)
        self.actor = self.trained("actor", Deterministic(observations, self.hidden, -self.high, self.high))
        self.actor_target = self.target_of("actor")

    def update(self, batch: Transitions, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            noise = 0.2 * torch.randn(batch.actions.shape, generator=generator)
            actions = smoothed_actions(self.actor_target(batch.next_observations), noise, 0.5, -self.high, self.high)
            after = self.critic_target(batch.next_observations, actions).amin(0)
        found = self.fit_critic(batch, after)
        if step % 2 == 1:
            taken = self.actor(batch.observations)
            q = self.critic(batch.observations, taken)
            found["actor_loss"] = self.step("actor", self.actor_loss(q, taken, batch.actions))
            self.follow("critic", "actor")
        return found

    def actor_loss(self, q: Tensor, taken: Tensor, actions: Tensor) -> Tensor:
        return td3_policy_loss(q)

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        return self.actor(observations)


class TD3BC(TD3):
    """TD3 + BC: the same, tied to the logged actions."""

    def actor_loss(self, q: Tensor, taken: Tensor, actions: Tensor) -> Tensor:
        return losses.td3_bc_loss(q[0], taken, actions, self.cfg.alpha)


class Weighted(Learner):
    """IQL and AWAC: a normal policy that imitates the logged steps, the better ones more."""

    def __init__(self, cfg, observations: int, actions: int) -> None:
        super().__init__(cfg, observations, actions)
        self.actor = self.trained("actor", Gaussian(observations, actions, self.hidden))

    def imitate(self, batch: Transitions, weights: Tensor) -> Tensor:
        log_probs = self.actor.log_prob(self.actor(batch.observations), batch.actions)
        return self.step("actor", -(weights * log_probs).mean())

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        return self.actor.mode(self.actor(observations)).clamp(-1, 1)


class IQL(Weighted):
    """V is a high expectile of Q over the logged actions: no other action is ever valued."""

    def __init__(self, cfg, observations: int, actions: int) -> None:
        super().__init__(cfg, observations, actions)
        self.v = self.trained("v", Value(observations, self.hidden))

    def update(self, batch: Transitions, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            q = self.critic_target(batch.observations, batch.actions).amin(0)
        advantages = q - self.v(batch.observations)
        found = {"v_loss": self.step("v", losses.expectile_loss(advantages, self.cfg.expectile))}
        weights = losses.iql_weights(advantages.detach(), self.cfg.temperature)
        found["actor_loss"] = self.imitate(batch, weights)
        with torch.no_grad():
            after = self.v(batch.next_observations)
        found |= self.fit_critic(batch, after)
        self.follow("critic")
        return found


class AWAC(Weighted):
    """Advantages against the policy's own action; critics as SAC's, without the entropy."""

    def update(self, batch: Transitions, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            after = self.critic_target(batch.next_observations, self.drawn(batch.next_observations, generator)).amin(0)
        found = self.fit_critic(batch, after)
        with torch.no_grad():
            own = self.critic(batch.observations, self.drawn(batch.observations, generator)).amin(0)
            advantages = self.critic(batch.observations, batch.actions).amin(0) - own
        found["actor_loss"] = self.imitate(batch, losses.awac_weights(advantages, self.cfg.awac_lam))
        self.follow("critic")
        return found

    def drawn(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        return self.actor.sample(self.actor(observations), generator).clamp(-1, 1)


LEARNERS = {"bc": Cloning, "bcq": BCQ, "td3": TD3, "td3_bc": TD3BC, "iql": IQL, "awac": AWAC}
