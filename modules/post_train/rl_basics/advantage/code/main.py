"""Advantages: eleven estimators against the exact A^π, the gradients they give, and what a baseline may change.

    A^π(s, a) = Q^π(s, a) − V^π(s)        ∇J = Σ_t γ^t E[∇ log π(a_t|s_t) · Ψ_t]   for Ψ = return, Q, A, δ, …

The MDP is small enough to know V, Q, A and ∇J exactly. The README explains every metric and every choice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune import config, ops
from finetune.errors import UserError
from finetune.rl import mdp as tables
from finetune.rl.advantages import group_normalised, leave_one_out, n_step, retrace, tree_backup, upgo, vtrace
from finetune.rl.mdp import MDP
from finetune.rl.moments import Moments, RewardScale, chi, seen_by_the_gradient
from finetune.rl.planning import evaluate
from finetune.rl.rollout import Rollout, numpy_generator, sample_tabular

from . import dueling, plots, scaling, tokens
from .gradients import GRADIENTS, RESCALED_GRADIENTS, UNBIASED_GRADIENTS, Slopes, exact_gradient, gradients

ON_POLICY = ("mc", "td", "n_step", "gae", "upgo", "leave_one_out", "group_normalised")
OFF_POLICY = ("importance", "vtrace", "retrace", "tree_backup")  # from the rollouts of another policy
ESTIMATORS = ON_POLICY + OFF_POLICY
UNBIASED = ("mc", "td", "n_step", "gae", "leave_one_out", "importance", "retrace", "tree_backup")  # with exact V

CHANCE = 3  # standard deviations of chance


@dataclass
class Config(config.Config):
    threads: int = 1  # the tables are small
    steps: int = 320  # batches of rollouts
    checkpoint_every: int = 100
    data: Path | None = None  # an MDP in an npz, as the module mdp reads it; none: a random one that the seed gives
    states: int = 12  # of the random MDP, besides the terminal one
    actions: int = 3
    branching: int = 2  # states that a pair may lead to
    reach: int = 3  # how far a step may go on the ring of states
    ending: float = 0.02  # probability that a step ends the episode
    gamma: float = 0.9
    length: int = 96  # steps of a rollout; what lies behind is worth what the critic says
    groups: int = 8  # groups a batch from each state
    group: int = 4  # rollouts of a group
    n: int = 4  # rewards of the n-step estimate
    lam: float = 0.9  # of GAE, Retrace and tree-backup
    sweeps: int = 2  # the half-learnt critic: so many sweeps of policy evaluation from zero
    tokens: int = 6  # of the longest answer in the part about credit by token, whose answers are all written down
    beta: float = 0.05  # of the KL penalty on each of its tokens
    shuffle_rewards: bool = False  # control: the rewards of a batch are dealt out anew, so there is nothing to learn

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=60, states=8)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"states": 1, "actions": 2, "branching": 1, "reach": 1, "length": 1, "groups": 1, "group": 2, "n": 1}
        for name, bound in (least | {"sweeps": 0}).items():
            if getattr(self, name) < bound:
                raise UserError(f"--{name} {getattr(self, name)} is too small: it must be at least {bound}")
        if not 4 <= self.tokens <= 9:
            raise UserError(f"--tokens {self.tokens} is not within 4 and 9: every answer of so many is written down")
        if self.beta < 0:
            raise UserError(f"--beta {self.beta} is below 0")
        for name in ("gamma", "lam", "ending"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)} is not within 0 and 1")
        if self.gamma == 1:
            raise UserError("--gamma 1: rollouts have to be cut somewhere; take one below 1")


def main(cfg: Config, run) -> dict[str, Any]:
    mdp = load(cfg, run)
    counted = mdp.allowed & ~mdp.terminal[:, None]  # (S, A)
    policy = softmax(numpy_generator(run, "policy").standard_normal(mdp.size), mdp.allowed)
    other = tables.uniform(mdp)  # acts in the off-policy rollouts
    V = tables.solve(mdp, policy)
    truth = np.where(counted, tables.action_values(mdp, V) - V[:, None], 0.0).ravel()  # (S·A,)
    critics = {"exact": V, "half_learnt": evaluate(mdp, policy, np.zeros(len(V)), cfg.sweeps)}
    sides = {"on_policy": ON_POLICY, "off_policy": OFF_POLICY}
    moments = {f"{c}_{side}": Moments(len(names), counted.size) for c in critics for side, names in sides.items()}
    slopes = Slopes(exact_gradient(mdp, policy, cfg.length), numpy_generator(run, "directions"))

    scale = RewardScale(8 * cfg.groups * cfg.group, mdp.gamma)

    first = np.repeat(np.flatnonzero(~mdp.terminal), cfg.groups * cfg.group)
    for step in run.steps(cfg.steps, moments | {"gradients": slopes, "scale": scale}):
        draw = numpy_generator(run, "rollout", step)
        mine = sample_tabular(mdp, policy, cfg.length, first, draw)
        theirs = sample_tabular(mdp, other, cfg.length, first, draw)
        whole = sample_tabular(mdp, policy, cfg.length, first_states(cfg, mdp, draw), draw)
        if cfg.shuffle_rewards:
            for rollout in (mine, theirs, whole):
                shuffle(rollout, draw)
        for name, critic in critics.items():
            found = on_policy(cfg, mine, torch.from_numpy(critic))
            moments[f"{name}_on_policy"].add(pairs_of(mine, mdp), found)
            found = off_policy(cfg, mdp, theirs, policy, other, critic)
            moments[f"{name}_off_policy"].add(pairs_of(theirs, mdp), found)
        slopes.add(gradients(cfg.group, cfg.lam, mdp, whole, policy, V, scale))
        off = both("half_learnt", moments, Moments.mean) - truth
        errors = seen_by_the_gradient(off, policy, counted)
        run.log(step, **{f"error_{name}": error for name, error in zip(ESTIMATORS, errors, strict=True)})

    judge_exact(run, mdp, policy, counted)
    judge_shaping(run, mdp, policy)
    dueling.judge(run, mdp, policy)
    scaling.judge(run)
    tokens.judge(run, cfg.tokens, cfg.beta, cfg.lam, cfg.gamma)
    if not cfg.steps:
        run.judge("gain_gae", 0.0, baseline=0.0, target=0.9)
        return {}
    judge_unbiased(run, truth, moments)
    judge_gradients(run, slopes)
    return show_estimators(cfg, run, mdp, policy, counted, truth, moments)


# --- The estimators, of the first step of each row


def on_policy(cfg: Config, rollout: Rollout, V: Tensor) -> Tensor:
    """(estimators, N). The rows of a group lie behind each other and begin in one state."""
    given = (
        rollout.rewards, V[rollout.observations], V[rollout.next_observations], rollout.terminated, rollout.truncated
    )  # fmt: skip
    mc, returns = ops.gae(*given, gamma=cfg.gamma, lam=1.0)
    td, _ = ops.gae(*given, gamma=cfg.gamma, lam=0.0)
    gae, _ = ops.gae(*given, gamma=cfg.gamma, lam=cfg.lam)
    grouped = returns[0].view(-1, cfg.group)
    return torch.stack(
        [
            mc[0],
            td[0],
            n_step(*given, n=cfg.n, gamma=cfg.gamma)[0],
            gae[0],
            upgo(*given, gamma=cfg.gamma)[0],
            leave_one_out(grouped).flatten(),
            group_normalised(grouped).flatten(),
        ]
    )


def off_policy(
    cfg: Config, mdp: MDP, rollout: Rollout, policy: np.ndarray, behaviour: np.ndarray, critic: np.ndarray
) -> Tensor:
    """(estimators, N) of `policy`, from rollouts of `behaviour`. What is asked for is the advantage of the action that
    was taken, so V-trace's own factor ρ_0, which makes up for how often it is taken, is divided out."""
    states, actions, after = rollout.observations, rollout.actions, rollout.next_observations
    V, ends = torch.from_numpy(critic), (rollout.terminated, rollout.truncated)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_probs = torch.from_numpy(np.log(policy))[states, actions]
        log_ratios = log_probs - torch.from_numpy(np.log(behaviour))[states, actions]
    found = []
    for bound in (float("inf"), 1.0):
        given = (rollout.rewards, V[states], V[after], *ends, log_ratios)
        advantages, _ = vtrace(*given, gamma=cfg.gamma, rho_bar=bound, c_bar=bound)
        found.append(advantages[0] / log_ratios[0].exp().clamp(max=bound))
    Q = torch.from_numpy(np.where(mdp.allowed, mdp.R + mdp.gamma * mdp.P @ critic, 0.0))
    means = (torch.from_numpy(policy) * Q).sum(1)
    given = (rollout.rewards, Q[states, actions], means[after], *ends)
    for targets in (
        retrace(*given, log_ratios, gamma=cfg.gamma, lam=cfg.lam),
        tree_backup(*given, log_probs, gamma=cfg.gamma, lam=cfg.lam),
    ):
        found.append(targets[0] - means[states[0]])
    return torch.stack(found)


def pairs_of(rollout: Rollout, mdp: MDP) -> Tensor:
    return rollout.observations[0] * mdp.size[1] + rollout.actions[0]


def both(critic: str, moments: dict[str, Moments], what: Callable[[Moments], np.ndarray]) -> np.ndarray:
    """(estimators, S·A) in the order of ESTIMATORS."""
    return np.concatenate([what(moments[f"{critic}_{side}"]) for side in ("on_policy", "off_policy")])


def first_states(cfg: Config, mdp: MDP, draw: np.random.Generator) -> np.ndarray:
    """Groups that begin as the MDP does, for the gradient of J."""
    return draw.choice(len(mdp.start), 8 * cfg.groups, p=mdp.start).repeat(cfg.group)


def shuffle(rollout: Rollout, draw: np.random.Generator) -> None:
    flat = rollout.rewards.flatten()
    rollout.rewards = flat[torch.from_numpy(draw.permutation(len(flat)))].view(rollout.rewards.shape)


# --- What is shown


def judge_exact(run, mdp: MDP, policy: np.ndarray, counted: np.ndarray) -> None:
    """What makes A^π worth estimating: its mean under π is 0, and to act only where it is not below 0 loses nothing in
    any state (the policy improvement theorem)."""
    A = np.where(counted, tables.advantages(mdp, policy), 0.0)
    run.judge("advantages_mean", abs((policy * A).sum(1)).max(), target=1e-8, higher=False)
    kept = policy * (A >= -1e-12)  # never empty, as the mean is 0
    better = kept / kept.sum(1, keepdims=True)
    gained = tables.solve(mdp, better) - tables.solve(mdp, policy)
    run.judge("improvement_in_the_worst_state", gained[~mdp.terminal].min(), target=-1e-9)
    run.judge("improvement", float(mdp.start @ gained), baseline=0.0)


def judge_shaping(run, mdp: MDP, policy: np.ndarray) -> None:
    """r + γ φ(s') − φ(s) for any potential φ moves V by −φ and leaves every advantage where it was."""
    potential = np.where(mdp.terminal, 0.0, 10 * numpy_generator(run, "potential").standard_normal(len(mdp.terminal)))
    rewards = mdp.rewards + mdp.gamma * potential - potential[:, None, None]
    shaped = tables.make(
        mdp.P, rewards, mdp.gamma, terminal=mdp.terminal, start=mdp.start, allowed=mdp.allowed, actions=mdp.actions
    )
    before, after = (tables.advantages(m, policy)[mdp.allowed] for m in (mdp, shaped))
    run.judge("shaping_changes_advantages_by", abs(after - before).max(), target=1e-8, higher=False)
    moved = tables.solve(shaped, policy) - tables.solve(mdp, policy) + potential
    run.judge("shaping_moves_values_by_more", abs(moved).max(), target=1e-8, higher=False)


def judge_unbiased(run, truth: np.ndarray, moments: dict[str, Moments]) -> None:
    z = {}
    for critic in ("exact", "half_learnt"):
        off = chi(both(critic, moments, Moments.mean) - truth, both(critic, moments, Moments.of_mean))
        z[critic] = dict(zip(ESTIMATORS, off, strict=True))
    worst = max(z["exact"][name] for name in UNBIASED)
    run.judge("exact_critic_z", worst, baseline=z["half_learnt"]["td"], target=CHANCE, higher=False)


def judge_gradients(run, slopes: Slopes) -> None:
    mean, wanted, variance = slopes.mean(), slopes.wanted, slopes.variance()
    z = dict(zip(GRADIENTS, slopes.z(), strict=True))
    spread = dict(zip(GRADIENTS, variance / variance[GRADIENTS.index("reward_to_go")], strict=True))
    cosine = dict(zip(GRADIENTS, mean @ wanted / np.linalg.norm(mean, axis=1) / np.linalg.norm(wanted), strict=True))
    worst = max(z[name] for name in UNBIASED_GRADIENTS)
    run.judge("gradient_z", worst, baseline=z["group_normalised"], target=CHANCE, higher=False)
    run.judge("variance_with_optimal_baseline", spread["optimal_baseline"], baseline=1.0, target=0.5, higher=False)
    run.samples(
        "the policy gradient by its factor: z of the mean, variance (of reward-to-go = 1), cosine with ∇J",
        [
            {"factor": name, "z": f"{z[name]:.1f}", "variance": f"{spread[name]:.3f}", "cosine": f"{cosine[name]:.4f}"}
            for name in GRADIENTS
        ],
    )
    plots.gradient_variance(run, {name: spread[name] for name in GRADIENTS if name not in RESCALED_GRADIENTS})


def show_estimators(
    cfg: Config, run, mdp: MDP, policy: np.ndarray, counted: np.ndarray, truth: np.ndarray, moments: dict[str, Moments]
) -> dict[str, Any]:
    """Bias, deviation and error by estimator and critic, and what the policy gains that follows the estimates."""
    J = tables.performance(mdp, policy)

    def gain(advantages: np.ndarray) -> float:
        return tables.performance(mdp, followed(policy, advantages.reshape(policy.shape))) - J

    best = gain(truth)
    rows: list[dict[str, Any]] = [{"estimator": name} for name in ESTIMATORS]
    found: dict[str, Any] = {}
    for critic in ("exact", "half_learnt"):
        mean, variance, chance = (both(critic, moments, f) for f in (Moments.mean, Moments.variance, Moments.of_mean))
        known = counted & np.isfinite(variance[0].reshape(counted.shape))
        bias = seen_by_the_gradient(mean - truth, policy, known, chance)
        deviation = np.sqrt(np.where(known.ravel(), variance, 0.0).sum(-1) / max(1, known.sum()))
        for row, name, b, d, m in zip(rows, ESTIMATORS, bias, deviation, mean, strict=True):
            share = gain(m) / best
            row |= {f"bias, {LABELS[critic]}": f"{b:.3f}", f"deviation, {LABELS[critic]}": f"{d:.2f}"}
            if critic == "half_learnt":
                row |= {"gain": f"{share:.0%}"}
                found |= {f"bias_{name}": float(b), f"deviation_{name}": float(d)}
                if name == "gae":
                    run.judge("gain_gae", share, baseline=0.0, target=0.9)
    run.samples("estimates of A^π by critic; gain: of J, by following them once, of what A^π itself gains", rows)
    series = run.metrics.series()
    run.samples(
        "mean square error of the mean of n estimates from each state, half-learnt V",
        [{"estimator": name} | mse_at(series[f"error_{name}"], cfg.groups * cfg.group) for name in ESTIMATORS],
    )
    plots.estimators(run, found, ESTIMATORS)
    plots.errors(run, cfg.groups * cfg.group, ESTIMATORS)
    return found


def mse_at(curve: tuple[list[int], list[float]], per_step: int) -> dict[str, str]:
    """At n = 1k and 10k, as far as the run got."""
    errors = {(step + 1) * per_step: error for step, error in zip(*curve, strict=True)}
    reached = {f"{k}k": -(-1000 * k // per_step) * per_step for k in (1, 10)}  # whole batches
    return {f"n = {name}": f"{errors[n] ** 2:.2g}" if n in errors else "–" for name, n in reached.items()}


LABELS = {"exact": "exact V", "half_learnt": "half-learnt V"}


def followed(policy: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """π' ∝ π · exp(Â): a step of the natural gradient on the softmax's logits."""
    weights = policy * np.exp(advantages - advantages.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def softmax(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    weights = np.where(allowed, np.exp(logits), 0.0)
    return weights / weights.sum(1, keepdims=True)


def load(cfg: Config, run) -> MDP:
    if cfg.data is not None:
        return tables.load(cfg.data, cfg.gamma, run.say)
    draw = numpy_generator(run, "mdp")
    return tables.garnet(
        cfg.states, cfg.actions, cfg.branching, draw, cfg.gamma, reach=cfg.reach, mean=1.0, ending=cfg.ending
    )
