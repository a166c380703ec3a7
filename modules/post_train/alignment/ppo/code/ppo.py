"""Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347): networks, collection, update, loop.

    L = −mean(min(r A, (1 ± ε) A)) + c_v mean((V − G)²) − c_e mean(H)        r = π(a|s) / π_old(a|s)

+ where A > 0, − where A < 0: no gain from moving a probability further than ε. An update collects T steps of N
environments with π_old, estimates A and G = A + V by GAE, and makes several passes over the steps in minibatches.
[n] is the number of a detail in Huang et al. 2022, "The 37 implementation details of PPO"; the README lists all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune import ops
from finetune.rl.advantages import whitened
from finetune.rl.agents import surrogate
from finetune.rl.agents.networks import Categorical, Gaussian, Value, flattened, tanh_mlp
from finetune.rl.agents.reward_scale import RewardScale
from finetune.rl.agents.surrogate import approximate_kl, clip_fraction, explained_variance
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.rollout import Rollout, episode_seeds
from finetune.rl.envs.spaces import Image
from finetune.rl.envs.vector import VectorEnv
from finetune.rl.statistics import Welford
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config


@dataclass(frozen=True)
class Chosen:
    """The settings whose usual values depend on the actions."""

    gamma: float
    lr: float
    epochs: int
    minibatches: int
    entropy: float


DISCRETE = Chosen(gamma=0.99, lr=2e-3, epochs=5, minibatches=8, entropy=0.01)
CONTINUOUS = Chosen(gamma=0.9, lr=1e-3, epochs=10, minibatches=16, entropy=0.0)
ANSWERS = Chosen(gamma=1.0, lr=5e-4, epochs=2, minibatches=2, entropy=0.0)  # of a language model (lm.py)
TOY_ANSWERS = Chosen(gamma=1.0, lr=1e-3, epochs=4, minibatches=2, entropy=0.0)
# Mean returns of good policies; CleanRL's PPO has 490, −86 and about −150 there.
SOLVED = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0, "Pendulum-v1": -250.0}
PARTS = ("policy_loss", "value_loss", "entropy")
WINDOW = 20  # episodes whose mean return counts


def choose(cfg: Config, continuous: bool) -> Chosen:
    """What the settings say, and the usual values where they are `none`."""
    return given(cfg, CONTINUOUS if continuous else DISCRETE)


def given(cfg: Config, usual: Chosen) -> Chosen:
    return replace(usual, **{name: value for name in vars(usual) if (value := getattr(cfg, name)) is not None})


# --- Networks


class ActorCritic(nn.Module):
    """π(a|s) and V(s): two networks [26], or two layers on the features of a shared one [13]. Images go through the
    convolutions of DQN [21], scaled to 0 … 1 [22]. A Gaussian's standard deviations are parameters [23, 24], and the
    parts of an action are independent [25]."""

    def __init__(self, cfg: Config, observed: int | Image, actions: int, continuous: bool) -> None:
        super().__init__()
        widths = [cfg.hidden, cfg.hidden]
        self.trunk: nn.Module = nn.Identity()
        if cfg.shared:
            self.trunk = nn.Sequential(tanh_mlp([observed, *widths], last_scale=math.sqrt(2)), nn.Tanh())
            observed, widths = cfg.hidden, []
        self.policy = (Gaussian if continuous else Categorical)(observed, actions, widths)
        self.value = Value(observed, widths)
        if not cfg.orthogonal:  # [2] orthogonal weights of scale √2 and biases of 0, unless torch's own are wanted
            for layer in self.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    layer.reset_parameters()
        elif isinstance(last := self.policy.net[-1], nn.Linear):  # [2] nearly equal probabilities at first
            last.weight.data.mul_(cfg.policy_scale / 0.01)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) → the policy's distribution (B, P), V (B,)."""
        features = self.trunk(observations)
        return self.policy(features), self.value(features)

    def distribution(self, observations: Tensor) -> Tensor:
        return self.policy(self.trunk(observations))

    def values(self, observations: Tensor) -> Tensor:
        return self.value(self.trunk(observations))


class Standardized:
    """Observations less their running mean, over their running standard deviation [28], within ± clip [29]. Images are
    left as they are. What is running changes between two rollouts only: π_old is one policy."""

    def __init__(self, observed: int | Image, on: bool, clip: float) -> None:
        self.on, self.clip = on and not isinstance(observed, Image), clip
        self.seen = Welford(*([] if isinstance(observed, Image) else [observed]))
        self._update()

    def __call__(self, observations: Tensor) -> Tensor:
        if not self.on:
            return observations
        return ((observations - self.mean) * self.rate).clamp(-self.clip, self.clip)

    def see(self, observations: Tensor) -> None:
        if self.on:
            self.seen.add(observations.flatten(0, 1))
            self._update()

    def _update(self) -> None:
        spread = self.seen.variance() if self.seen.count else torch.ones_like(self.seen.mean)
        self.mean, self.rate = self.seen.mean.float(), (spread + 1e-8).rsqrt().float()

    def state_dict(self) -> dict[str, Tensor]:
        return self.seen.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen.load_state_dict(state)
        self._update()


@dataclass
class Batch:
    """The steps of a rollout in one row, with what policy and critic computed before the update."""

    observations: Tensor  # (B, D) as the policy saw them
    actions: Tensor  # (B,) or (B, A), not clipped to the bounds
    params: Tensor  # (B, P) of π_old
    log_probs: Tensor  # (B,) of π_old
    values: Tensor  # (B,) V before the update
    advantages: Tensor  # (B,)
    targets: Tensor  # (B,) G

    def rows(self, chosen: Tensor) -> Batch:
        return Batch(**{name: column[chosen] for name, column in vars(self).items()})

    def split(self, size: int) -> list[Batch]:
        """Minibatches of `size` steps, in order."""
        parts = zip(*(column.split(size) for column in vars(self).values()), strict=True)
        return [Batch(*columns) for columns in parts]


class PPO:
    def __init__(self, cfg: Config, envs: VectorEnv) -> None:
        observed, actions, continuous = environments.sizes(envs.envs[0])
        self.cfg, self.envs, self.chosen = cfg, envs, choose(cfg, continuous)
        self.model = ActorCritic(cfg, observed, actions, continuous)
        self.row = flattened(self.model)  # of all parameters
        self.optimizer = torch.optim.Adam([self.row], lr=self.chosen.lr, eps=cfg.adam_eps, fused=True)  # [3]
        self.standardized = Standardized(observed, cfg.normalize_observations, cfg.clip_observations)
        self.rewards = RewardScale(len(envs), self.chosen.gamma, clip=cfg.clip_rewards)
        self.kl = {"weight": cfg.kl_weight}

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "envs": self.envs, "rewards": self.rewards,
                "observations": self.standardized, "kl": self.kl}  # fmt: skip

    # --- Collection

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        return self.model.policy.sample(self.model.distribution(self.standardized(observations)), rng)

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Tensor:
        return self.model.policy.mode(self.model.distribution(self.standardized(observations)))

    def collect(self, rng: torch.Generator) -> Rollout:
        """(T, N) steps of N environments that go on where the last rollout stopped [1], as π_old saw them. An action is
        clipped to its bounds by the environment and kept as it was drawn [27]. Rewards are divided by the running
        deviation of the discounted return [30], within ± clip [31]."""
        rollout = self.envs.collect(lambda obs: self.act(obs, rng), self.cfg.horizon)
        seen = rollout.observations
        rollout.observations, rollout.next_observations = map(self.standardized, (seen, rollout.next_observations))
        self.standardized.see(seen)
        if self.cfg.normalize_rewards:
            rollout.rewards = self.rewards(rollout.rewards, rollout.ends).to(rollout.rewards.dtype)
        return rollout

    # --- Advantages

    @torch.no_grad()
    def batch(self, rollout: Rollout, rng: torch.Generator) -> Batch:
        """GAE with the critic before the update [5], in the order of the first pass."""
        cfg, policy = self.cfg, self.model.policy
        terminated, truncated = rollout.terminated, rollout.truncated
        if not cfg.bootstrap:
            terminated, truncated = rollout.ends, torch.zeros_like(truncated)
        values = self.model.values(rollout.observations)  # (T, N)
        next_values = torch.cat([values[1:], self.model.values(rollout.next_observations[-1:])])
        if (cut := truncated[:-1]).any():  # V of the state that was reached, not of the next episode's first
            next_values[:-1][cut] = self.model.values(rollout.next_observations[:-1][cut])
        advantages, targets = ops.gae(
            rollout.rewards, values, next_values, terminated, truncated, gamma=self.chosen.gamma, lam=cfg.lam
        )
        order = torch.randperm(advantages.numel(), generator=rng)
        if cfg.shuffle:
            advantages = advantages.flatten()[torch.randperm(len(order), generator=rng)]
        columns = (rollout.observations, rollout.actions)
        observations, actions = (column.flatten(0, 1)[order] for column in columns)
        # In the minibatches of the first pass: there the ratio is 1 to the last bit.
        params = torch.cat([self.model.distribution(part) for part in observations.split(self.size(len(order)))])
        log_probs = policy.log_prob(params, actions)
        rest = (column.flatten()[order] for column in (values, advantages, targets))
        return Batch(observations, actions, params, log_probs, *rest)

    def size(self, count: int) -> int:
        """Steps of a minibatch."""
        return -(-count // self.chosen.minibatches)

    # --- Update

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss of a minibatch [10], its log r (B,), and its parts."""
        cfg, policy = self.cfg, self.model.policy
        params, values = self.model(batch.observations)
        log_ratios = policy.log_prob(params, batch.actions) - batch.log_probs
        A = self.scaled(batch.advantages)
        if cfg.objective == "clip":
            policy_loss = surrogate.clipped_surrogate(log_ratios, A, cfg.clip).mean()  # [8]
        else:  # eq. 8 of the paper
            policy_loss = (self.kl["weight"] * policy.kl(batch.params, params) - log_ratios.exp() * A).mean()
        value_loss = surrogate.value_loss(values, batch.targets, *self.near(batch)).mean()
        entropy = policy.entropy(params).mean()
        parts = dict(zip(PARTS, (policy_loss, value_loss, entropy), strict=True))  # [12]
        return policy_loss + cfg.value_weight * value_loss - self.chosen.entropy * entropy, log_ratios.detach(), parts

    def scaled(self, advantages: Tensor) -> Tensor:
        return whitened(advantages) if self.cfg.normalize_advantages else advantages  # [7]

    def near(self, batch: Batch) -> tuple[Tensor, float] | tuple[()]:
        """What V is kept near to, and how near [9]."""
        return () if self.cfg.value_clip is None else (batch.values, self.cfg.value_clip)

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Adds the gradient of `loss`; its log r (B,), its parts (3,). The slopes of the clipped objective are written
        out: a sixth of the time of `loss` and its backward pass is saved."""
        cfg, policy = self.cfg, self.model.policy
        if cfg.objective != "clip":
            loss, log_ratios, parts = self.loss(batch)
            loss.backward()
            return log_ratios, torch.stack([*parts.values()]).detach()
        params, values = self.model(batch.observations)
        log_probs, entropy = policy.log_prob(params, batch.actions), policy.entropy(params)
        with torch.no_grad():
            log_ratios = log_probs - batch.log_probs
            A, n = self.scaled(batch.advantages), len(values)
            losses, slope = surrogate.clipped_with_slope(log_ratios, A, cfg.clip)
            errors, value_slope = surrogate.value_with_slope(values, batch.targets, *self.near(batch))
            slopes = (
                slope / n,
                value_slope * (cfg.value_weight / n),
                torch.full_like(entropy, -self.chosen.entropy / n),
            )
            means = torch.stack([losses, errors, entropy]).mean(1)
        torch.autograd.backward((log_probs, values, entropy), slopes)
        return log_ratios, means

    def update(self, rollout: Rollout, rng: torch.Generator) -> dict[str, Tensor]:
        """`--epochs` passes over the rollout in minibatches [6], each in a new order; fewer if the KL divergence from
        π_old exceeds --target-kl."""
        cfg, batch = self.cfg, self.batch(rollout, rng)
        count, seen, passes = len(batch.values), [], []
        for epoch in range(self.chosen.epochs):
            ratios, ordered = [], batch.rows(torch.randperm(count, generator=rng)) if epoch else batch
            for minibatch in ordered.split(self.size(count)):
                self.optimizer.zero_grad(set_to_none=False)
                log_ratios, parts = self.backward(minibatch)
                ops.clip_grad_norm_([self.row], cfg.max_norm)  # [11] of all parameters together
                self.optimizer.step()
                ratios.append(log_ratios)
                seen.append(parts)
            passes.append(torch.cat(ratios))
            if cfg.target_kl is not None and approximate_kl(passes[-1]).mean() > cfg.target_kl:
                break
        every = torch.cat(passes)
        found = dict(zip(PARTS, torch.stack(seen).mean(0), strict=True))
        found |= {"kl": approximate_kl(every).mean(), "clip_fraction": clip_fraction(every, cfg.clip)}
        found |= {"first_ratio": passes[0][: self.size(count)].abs().max(), "passes": torch.tensor(float(len(passes)))}
        if cfg.objective == "kl":
            found["kl_weight"] = torch.tensor(self.adapt(batch))
        explained = explained_variance(batch.values, batch.targets)
        return found if explained.isnan() else found | {"explained_variance": explained}  # NaN: all targets are equal

    @torch.no_grad()
    def adapt(self, batch: Batch) -> float:
        """The paper's §4: β is halved where KL(π_old ‖ π) fell below two thirds of its target, and doubled above one
        and a half of it."""
        kl = self.model.policy.kl(batch.params, self.model.distribution(batch.observations)).mean()
        target, weight = self.cfg.kl_target, self.kl["weight"]
        self.kl["weight"] = weight / 2 if kl < target / 1.5 else weight * 2 if kl > target * 1.5 else weight
        return self.kl["weight"]

    def step(self, rate: float, rng: torch.Generator) -> dict[str, Tensor]:
        """One rollout and its update, with `rate` of the learning rate [4]."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.chosen.lr
        return self.update(self.collect(rng), rng)


# --- Loop


@dataclass
class Training:
    """What one training gave: returns of fresh episodes before and after, the mean return of the last `WINDOW` episodes
    after each update, and the environment steps until it was first `SOLVED` (all of them if it never was)."""

    before: list[float]
    after: list[float]
    curve: list[float]
    steps: int
    solved: bool


def train(
    cfg: Config, run: Run, env: str, repeat: int, envs: list[environments.Env], updates: int, name: str
) -> Training:
    """Repetition i has the same initial weights, episodes and random numbers whatever the settings."""
    run.seed("ppo", env, repeat)
    agent = PPO(cfg, VectorEnv(envs, run.generator("ppo", env, repeat).initial_seed()))
    size, limit = agent.cfg.horizon * len(envs), envs[0].episode_limit
    test = environments.make(env, cfg.eval_episodes, episode_limit=limit, args=cfg.env_arg)
    before = evaluate(agent, run, env, repeat, test)
    past: dict[str, Any] = {"recent": [], "curve": [], "steps": 0}
    for step in run.steps(updates, agent.state | {"past": past, "limit": limit}, phase=f"{name}_{repeat}"):
        rng = run.generator("ppo", env, repeat, step)
        found: dict[str, Any] = agent.step(1 - step / updates if cfg.anneal else 1.0, rng)
        past["recent"] = (past["recent"] + [earned for earned, _ in agent.envs.pop_finished()])[-WINDOW:]
        if past["recent"]:
            found["return"] = mean = fmean(past["recent"])
            past["curve"].append(mean)
            if not past["steps"] and len(past["recent"]) == WINDOW and mean >= SOLVED.get(env, math.inf):
                past["steps"] = (step + 1) * size
        run.log(step, **found)
    after = evaluate(agent, run, env, repeat, test)
    run.print(f"{name}, training {repeat}: return {fmean(before):.1f} before, {fmean(after):.1f} after")
    return Training(before, after, past["curve"], past["steps"] or updates * size, past["steps"] > 0)


def evaluate(agent: PPO, run: Run, env: str, repeat: int, envs: list[environments.Env]) -> list[float]:
    """Returns of fresh episodes: discrete actions are drawn, as in training; of continuous ones the mean is taken."""
    seeds, rng = episode_seeds(run, len(envs), "evaluation", env, repeat), run.generator("evaluation", env, repeat)
    return returns(envs, agent.greedy if envs[0].continuous else partial(agent.act, rng=rng), seeds)
