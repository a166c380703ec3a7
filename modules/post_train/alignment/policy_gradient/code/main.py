"""Policy gradients: REINFORCE with four baselines, the natural gradient, and TRPO. Reads top to bottom.

    ∇J = E[ Σ_t γ^t ∇ log π(a_t|s_t) · (G_t − b_t) ]      natural: F⁻¹ ∇J      TRPO: max surrogate s.t. KL ≤ δ

Williams 1992; Kakade 2001; Schulman et al. 2015 (arXiv:1502.05477). What is known exactly is in known.py. The README
explains every metric and every choice.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune import ops, optim
from finetune.errors import UserError
from finetune.rl.agents.networks import Categorical, Gaussian, Value
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.rollout import Rollout, episode_seeds
from finetune.rl.statistics import critical_z, mean_and_error
from finetune.runs import config
from finetune.runs.display import uncertain

from . import known, plots, variance
from .enumerated import discounts
from .losses import BASELINES, advantages, policy_loss
from .natural import flat, functional, line_search, natural_direction
from .offpolicy import effective_size

METHODS = ("reinforce", "natural", "trpo")
BEST = 500.0  # of CartPole-v1: its time limit


@dataclass
class Config(config.Config):
    threads: int = 1  # networks so small are fastest on one
    steps: int = 80  # updates of each method
    checkpoint_every: int = 20
    env: str = "CartPole-v1"  # a gymnasium id with vectors for observations
    methods: str = ",".join(METHODS)  # which to train, separated by commas
    episodes: int = config.bounded(16, at_least=2, at_most=10_000)  # of an update
    # an episode is cut off there if its environment has no time limit of its own
    max_episode_steps: int = config.bounded(1000, at_least=1, at_most=10**6)
    baseline: Literal["none", "mean", "leave_one_out", "learned"] = "learned"
    gamma: float = config.bounded(0.99, at_least=0, at_most=1)
    discount_correction: bool = False  # the factor γ^t of the theorem, which is usually left out
    entropy: float = config.bounded(0.0, at_least=0, at_most=1000)  # weight of the entropy bonus
    reuse: int = config.bounded(1, at_least=1, at_most=10_000)  # reinforce: steps on one batch
    correction: Literal["none", "step"] = "step"  # of the later ones: the ratio of each action's probabilities
    ratio_bound: float = config.bounded(2.0, above=0, at_most=10**6)  # it is cut off there
    hidden: int = config.bounded(64, at_least=1, at_most=8192)  # width of the two hidden layers of policy and value
    lr: float = config.bounded(0.005, at_least=0, at_most=1000)  # reinforce: Adam's, falling to a tenth
    value_lr: float = config.bounded(0.005, at_least=0, at_most=1000)  # of the learned baseline
    value_epochs: int = config.bounded(20, at_least=0, at_most=10**6)  # its steps an update, on the whole batch
    # natural and trpo: KL of a step; it falls to a tenth, as the learning rate does
    delta: float = config.bounded(0.02, above=0, at_most=10**6)
    damping: float = config.bounded(0.01, above=0, at_most=10**6)  # added to the Fisher matrix
    iterations: int = config.bounded(10, at_least=1, at_most=10_000)  # of conjugate gradients
    # added to every reward that is learned from, not to those that are reported
    reward_shift: float = config.bounded(0.0, at_least=-1e6, at_most=1e6)
    shuffle_advantages: bool = False  # control: the advantages are dealt out anew, so there is nothing to learn
    # before and after, with actions drawn as in training
    eval_episodes: int = config.bounded(50, at_least=2, at_most=10**5)
    # updates on the short corridor, but at most five times --steps; 0: without it
    corridor_steps: int = config.bounded(200, at_least=0, at_most=10**6)
    corridor_repeats: int = config.bounded(4, at_least=2, at_most=10_000)  # with each baseline
    corridor_lr: float = config.bounded(2e-3, at_least=0, at_most=1000)  # plain gradient ascent
    # that the gradient is estimated from where it is compared with the enumerated one
    score_episodes: int = config.bounded(100_000, at_least=1000, at_most=10**8)
    # updates' worth of episodes for the variance by baseline; 0: without it
    variance_groups: int = config.bounded(100, at_least=0, at_most=10**5)

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=16, methods="trpo", hidden=32, eval_episodes=20, corridor_repeats=2,
                   corridor_steps=80, score_episodes=20_000, variance_groups=40)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.variance_groups < 10:
            raise UserError(f"--variance-groups {self.variance_groups} is too small: it must be 0 or at least 10")
        for name in self.methods.split(","):
            if name not in METHODS:
                raise UserError(f"--methods: '{name}' is not one of {', '.join(METHODS)}")


def main(cfg: Config, run) -> dict[str, Any]:
    cut = environments.EpisodeLimit(cfg.max_episode_steps, run.print)
    envs = environments.make(cfg.env, cfg.episodes, episode_limit=cut)
    for name in cfg.methods.split(","):
        train(cfg, run, name, envs)
    plots.learning(run, cfg)
    if cfg.corridor_steps:
        for baseline in BASELINES:
            known.walk(cfg, run, baseline)
        known.judge_corridor(cfg, run)
    listed = known.judge_gradient(run, cfg.score_episodes, cfg.episodes)
    known.judge_discount(run, cfg.score_episodes)
    known.judge_off_policy(run, cfg.score_episodes)
    known.judge_invariance(run)
    judge_variance(cfg, run, envs, listed)
    return cut.summary()


# --- Training on gymnasium


def train(cfg: Config, run, method: str, envs: list[Any]) -> None:
    policy, value = networks(cfg, run, envs)
    optimizer = torch.optim.Adam(policy.parameters(), lr=cfg.lr)
    value_optimizer = torch.optim.Adam(value.parameters(), lr=cfg.value_lr)
    state = {"policy": policy, "value": value, "optimizer": optimizer, "value_optimizer": value_optimizer,
             "cut": envs[0].episode_limit}  # fmt: skip
    size = state["rewards"] = RewardSize()
    before = evaluate(cfg, run, policy, envs, "before")
    for step in run.steps(cfg.steps, state, phase=method):
        rollout = collect(run, policy, envs, (method, step))
        earned = rollout.rewards.sum(0).tolist()
        rollout.rewards = rollout.rewards + cfg.reward_shift * rollout.first_episode
        rollout.rewards = rollout.rewards / size.see(rollout.rewards)
        psi, targets = with_baseline(cfg, rollout, value)
        if cfg.discount_correction:
            psi = discounts(cfg.gamma, psi) * psi
        if cfg.shuffle_advantages:
            psi = shuffled(psi, rollout.first_episode, run.generator("shuffle", method, step))
        batch = Batch(rollout, psi)
        left = optim.cosine(step, cfg.steps, 0, 1.0, 0.1)
        if method == "reinforce":
            found = reinforce(cfg, policy, optimizer, batch, left * cfg.lr)
        else:
            found = natural_step(cfg, policy, batch, left * cfg.delta, search=method == "trpo")
        if cfg.baseline == "learned":
            found["value_loss"] = fit(cfg, value, value_optimizer, batch.observations, targets[rollout.first_episode])
        run.log(step, **{"return": sum(earned) / len(earned)}, **found)
    after = evaluate(cfg, run, policy, envs, "after")
    run.print(f"{method}: {after[0]:.1f} ± {after[1]:.1f} (standard error, {cfg.eval_episodes} episodes)")
    target = None
    if cfg.env == "CartPole-v1":  # a part of the way from the untrained policy to the best possible
        target = before[0] + (0.25 if run.toy else 0.5) * (BEST - before[0])
    run.result(f"return_{method}", after[0], error=after[1], baseline=before[0], target=target)


class Batch:
    """The steps that count, in one row."""

    def __init__(self, rollout: Rollout, psi: Tensor) -> None:
        alive = rollout.first_episode
        self.observations, self.actions = rollout.observations[alive], rollout.actions[alive]
        psi = psi[alive]
        self.psi = psi / psi.square().mean().sqrt().clamp(min=1e-8)  # a scale for the step, and no second baseline


def reinforce(
    cfg: Config, policy: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float
) -> dict[str, float]:
    """--reuse steps of Adam on − mean(w log π · Ψ) − entropy bonus. w = π/π_old of the action, and at most
    --ratio-bound: it corrects which actions were taken, not which states were seen."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    old, weights = None, torch.ones_like(batch.psi)
    for _ in range(cfg.reuse):
        params = policy(batch.observations)
        log_probs = policy.log_prob(params, batch.actions)
        if old is None:
            old, old_log_probs = params.detach(), log_probs.detach()
        elif cfg.correction == "step":
            weights = (log_probs.detach() - old_log_probs).exp().clamp(max=cfg.ratio_bound)
        entropy = policy.entropy(params).mean()
        loss = policy_loss(log_probs, weights * batch.psi, torch.ones_like(batch.psi)) / len(batch.psi)
        optimizer.zero_grad()
        (loss - cfg.entropy * entropy).backward()
        norm = ops.clip_grad_norm_([p.grad for p in policy.parameters()], 1.0)
        optimizer.step()
    with torch.no_grad():
        kl = policy.kl(old, policy(batch.observations)).mean()
    found = {"entropy": entropy.item(), "kl": kl.item(), "grad_norm": float(norm)}
    return found | ({"effective": float(effective_size(weights)) / len(weights)} if cfg.reuse > 1 else {})


def natural_step(cfg: Config, policy: nn.Module, batch: Batch, delta: float, search: bool) -> dict[str, float]:
    """θ += √(2δ / xᵀFx) x with x = F⁻¹ g; with `search` (TRPO) the step is shortened until it keeps its promise."""
    distribution = functional(policy, batch.observations)
    theta = flat(policy.parameters())
    old = distribution(theta).detach()
    old_log_probs = policy.log_prob(old, batch.actions)

    def surrogate(at: Tensor) -> Tensor:
        params = distribution(at)
        ratio = (policy.log_prob(params, batch.actions) - old_log_probs).exp()
        return (ratio * batch.psi).mean() + cfg.entropy * policy.entropy(params).mean()

    at = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(at), at)
    x, length = natural_direction(distribution, policy.kl, theta, gradient, cfg.damping, cfg.iterations)
    step, taken = (2 * delta / length.clamp(min=1e-12)).sqrt() * x, 1.0
    with torch.no_grad():
        if search:
            new, taken = line_search(surrogate, lambda at: policy.kl(old, distribution(at)).mean(), theta, step, delta)
        else:
            new = theta + step
        kl = policy.kl(old, distribution(new)).mean()
        nn.utils.vector_to_parameters(new, policy.parameters())
    return {"entropy": policy.entropy(old).mean().item(), "kl": kl.item(), "step_taken": taken}


def with_baseline(cfg: Config, rollout: Rollout, value: nn.Module) -> tuple[Tensor, Tensor]:
    if cfg.baseline != "learned":
        return advantages(rollout, cfg.gamma, cfg.baseline, None)
    with torch.no_grad():
        values, after = value(rollout.observations), value(rollout.next_observations)
    scale = value_scale(cfg)
    return advantages(rollout, cfg.gamma, "learned", scale * values, scale * after)


def value_scale(cfg: Config) -> float:
    """The network's output times this is a return of rewards of 1, the largest: it learns numbers near one."""
    return min(1 / max(1 - cfg.gamma, 1e-3), 100.0)


def fit(cfg: Config, value: nn.Module, optimizer: torch.optim.Optimizer, seen: Tensor, targets: Tensor) -> float:
    """The learned baseline: squared error to the returns-to-go. Only after the policy's step, or it would know them."""
    targets = targets / value_scale(cfg)
    loss = torch.zeros(())
    for _ in range(cfg.value_epochs):
        loss = (value(seen) - targets).square().mean()
        optim.descend(loss, optimizer)
    return loss.item()


def networks(cfg: Config, run, envs: list[Any]) -> tuple[nn.Module, nn.Module]:
    """The same for every method, so that their curves begin alike."""
    run.seed("networks")
    observations, actions, continuous = environments.sizes(envs[0])
    kind = Gaussian if continuous else Categorical
    hidden = [cfg.hidden, cfg.hidden]
    return kind(observations, actions, hidden), Value(observations, hidden)


def acting(policy: nn.Module, generator: torch.Generator) -> environments.Act:
    return lambda observations: policy.sample(policy(observations), generator)


def collect(run, policy: nn.Module, envs: list[Any], key: tuple[Any, ...]) -> Rollout:
    """One episode of each environment. Seeds depend on the step only, so a resumed run plays the same ones."""
    seeds = episode_seeds(run, len(envs), "episodes", *key)
    return environments.play(envs, acting(policy, run.generator("actions", *key)), seeds)


def evaluate(cfg: Config, run, policy: nn.Module, envs: list[Any], when: str) -> tuple[float, float]:
    """Mean return of fresh episodes and its standard error."""
    seeds = episode_seeds(run, cfg.eval_episodes, "evaluation", when)
    return mean_and_error([returns(envs, acting(policy, run.generator("evaluation", when)), seeds)])


def shuffled(psi: Tensor, alive: Tensor, generator: torch.Generator) -> Tensor:
    values = psi[alive]
    mixed = torch.zeros_like(psi)
    mixed[alive] = values[torch.randperm(len(values), generator=generator)]
    return mixed


# --- How much the estimate scatters


def judge_variance(cfg: Config, run, envs: list[Any], listed: dict[str, variance.Share]) -> None:
    """The gradient at the untrained policy with each baseline, from the same episodes; `listed`: the same where all
    trajectories are known. The learned baseline is fitted to other episodes, half as many."""
    if not cfg.variance_groups:
        return
    policy, value = networks(cfg, run, envs)
    optimizer = torch.optim.Adam(value.parameters(), lr=cfg.value_lr)
    others = [collect(run, policy, envs, ("variance", "fit", i)) for i in range(-(-cfg.variance_groups // 2))]
    groups = [collect(run, policy, envs, ("variance", i)) for i in range(cfg.variance_groups)]
    size = RewardSize()
    size.see(torch.cat([r.rewards.flatten() for r in others]))
    for rollout in (*others, *groups):
        rollout.rewards = rollout.rewards / size.size
    seen = torch.cat([r.observations[r.first_episode] for r in others])
    targets = torch.cat([advantages(r, cfg.gamma, "none", None)[1][r.first_episode] for r in others])
    for _ in range(20):
        fit(cfg, value, optimizer, seen, targets)
    with torch.no_grad():
        scale = value_scale(cfg)
        said = [(scale * value(g.observations), scale * value(g.next_observations)) for g in groups]
    found = variance.of_network(policy, groups, said, cfg.gamma, run.generator("variance"))
    learned = found["learned"]
    target = 1 - 3 * learned.error if cfg.env == "CartPole-v1" else None  # less, by more than its noise
    name = "variance_with_learned_baseline"
    run.result(name, learned.share, error=learned.error, baseline=1.0, target=target, higher=False)
    z = max(found[b].z for b in ("leave_one_out", "learned"))
    run.result("variance_means_z", z, target=critical_z(2), higher=False)
    run.table(
        "variance of the gradient estimate ± its standard error, of that without a baseline; z of its mean",
        [
            {
                "baseline": name.replace("_", " "),
                "two-step MDP": uncertain(exact.share, exact.error),
                "z": f"{exact.z:.1f}",
                cfg.env: uncertain(found[name].share, found[name].error) if name in found else "–",
                f"z on {cfg.env}": f"{found[name].z:.1f}" if name in found else "–",
            }
            for name, exact in listed.items()
        ],
    )
    plots.variance(run, cfg.env, listed, found)
