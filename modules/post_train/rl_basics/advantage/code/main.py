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

from finetune import ops
from finetune.rl.advantages import group_normalized, leave_one_out, n_step, retrace, tree_backup, upgo, vtrace
from finetune.rl.agents.reward_scale import RewardScale
from finetune.rl.envs.rollout import Rollout, numpy_generator
from finetune.rl.statistics import Moments, chi_square_z, critical_z, gradient_bias, gradient_bias_interval
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP, evaluate
from finetune.rl.tabular.sample import sample_tabular
from finetune.runs import config
from finetune.runs.display import uncertain

from . import dueling, plots, scaling, tokens
from .gradients import GRADIENTS, RESCALED_GRADIENTS, UNBIASED_GRADIENTS, Slopes, exact_gradient, gradients

ON_POLICY = ("mc", "td", "n_step", "gae", "upgo", "leave_one_out", "group_normalized")
OFF_POLICY = ("importance", "vtrace", "retrace", "tree_backup")  # from the rollouts of another policy
ESTIMATORS = ON_POLICY + OFF_POLICY
UNBIASED = ("mc", "td", "n_step", "gae", "leave_one_out", "importance", "retrace", "tree_backup")  # with exact V


@dataclass
class Config(config.Config):
    threads: int = 1  # the tables are small
    steps: int = 320  # batches of rollouts
    checkpoint_every: int = 100
    data: Path | None = None  # an MDP in an npz, as the module mdp reads it; none: a random one that the seed gives
    states: int = config.bounded(12, at_least=1, at_most=2000)  # of the random MDP, besides the terminal one
    actions: int = config.bounded(3, at_least=2, at_most=1000)
    branching: int = config.bounded(2, at_least=1, at_most=1000)  # states that a pair may lead to
    reach: int = config.bounded(3, at_least=1, at_most=1000)  # how far a step may go on the ring of states
    ending: float = config.bounded(0.02, at_least=0, at_most=1)  # probability that a step ends the episode
    gamma: float = config.bounded(0.9, at_least=0, below=1)  # below 1, as rollouts are cut somewhere
    # steps of a rollout; what lies behind is worth what the critic says
    length: int = config.bounded(96, at_least=1, at_most=10**6)
    groups: int = config.bounded(8, at_least=1, at_most=10**6)  # groups a batch from each state
    group: int = config.bounded(4, at_least=2, at_most=10**6)  # rollouts of a group
    n: int = config.bounded(4, at_least=1, at_most=10**6)  # rewards of the n-step estimate
    lam: float = config.bounded(0.9, at_least=0, at_most=1)  # of GAE, Retrace and tree-backup
    # the half-learned critic: so many sweeps of policy evaluation from zero
    sweeps: int = config.bounded(2, at_least=0, at_most=10**6)
    # of the longest answer in the part about credit by token, whose answers are all written down
    tokens: int = config.bounded(6, at_least=4, at_most=9)
    beta: float = config.bounded(0.05, at_least=0, at_most=1000)  # of the KL penalty on each of its tokens
    shuffle_rewards: bool = False  # control: the rewards of a batch are dealt out anew, so there is nothing to learn

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=60, states=8)


def main(cfg: Config, run) -> dict[str, Any]:
    mdp = load(cfg, run)
    counted = mdp.allowed & ~mdp.terminal[:, None]  # (S, A)
    policy = softmax(numpy_generator(run, "policy").standard_normal(mdp.size), mdp.allowed)
    other = tables.uniform(mdp)  # acts in the off-policy rollouts
    V = tables.solve(mdp, policy)
    truth = np.where(counted, tables.action_values(mdp, V) - V[:, None], 0.0).ravel()  # (S·A,)
    critics = {"exact": V, "half_learned": evaluate(mdp, policy, np.zeros(len(V)), cfg.sweeps)}
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
        off = both("half_learned", moments, Moments.mean) - truth
        errors = gradient_bias(off, policy, counted)
        run.log(step, **{f"error_{name}": error for name, error in zip(ESTIMATORS, errors, strict=True)})

    judge_exact(run, mdp, policy, counted)
    judge_shaping(run, mdp, policy)
    dueling.judge(run, mdp, policy)
    scaling.judge(run)
    tokens.judge(run, cfg.tokens, cfg.beta, cfg.lam, cfg.gamma)
    if not cfg.steps:
        run.result("gain_gae", 0.0, baseline=0.0, target=0.8)
        return {}
    judge_unbiased(run, truth, moments, magnitude(V))
    judge_gradients(run, slopes, drawn=cfg.data is None)
    show_estimators(cfg, run, mdp, policy, counted, truth, moments)
    return {}


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
            group_normalized(grouped).flatten(),
        ]
    )


def off_policy(
    cfg: Config, mdp: MDP, rollout: Rollout, policy: np.ndarray, behavior: np.ndarray, critic: np.ndarray
) -> Tensor:
    """(estimators, N) of `policy`, from rollouts of `behavior`. What is asked for is the advantage of the action that
    was taken, so V-trace's own factor ρ_0, which makes up for how often it is taken, is divided out."""
    states, actions, after = rollout.observations, rollout.actions, rollout.next_observations
    V, ends = torch.from_numpy(critic), (rollout.terminated, rollout.truncated)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_probs = torch.from_numpy(np.log(policy))[states, actions]
        log_ratios = log_probs - torch.from_numpy(np.log(behavior))[states, actions]
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
    size = magnitude(A)
    run.result("advantages_mean", abs((policy * A).sum(1)).max() / size, target=1e-8, higher=False)
    kept = policy * (A >= -1e-12)  # never empty, as the mean is 0
    better = kept / kept.sum(1, keepdims=True)
    gained = tables.solve(mdp, better) - tables.solve(mdp, policy)
    run.result("improvement_in_the_worst_state", gained[~mdp.terminal].min(), target=-1e-9 * size)
    run.result("improvement", float(mdp.start @ gained), baseline=0.0)


def judge_shaping(run, mdp: MDP, policy: np.ndarray) -> None:
    """r + γ φ(s') − φ(s) for any potential φ moves V by −φ and leaves every advantage where it was."""
    V = tables.solve(mdp, policy)
    potential = numpy_generator(run, "potential").standard_normal(len(V)) * ~mdp.terminal * magnitude(V)
    rewards = mdp.rewards + mdp.gamma * potential - potential[:, None, None]
    shaped = tables.make(
        mdp.P, rewards, mdp.gamma, terminal=mdp.terminal, start=mdp.start, allowed=mdp.allowed, actions=mdp.actions
    )
    before, after = (tables.advantages(m, policy)[mdp.allowed] for m in (mdp, shaped))
    run.result("shaping_changes_advantages_by", abs(after - before).max() / magnitude(V), target=1e-8, higher=False)
    moved = tables.solve(shaped, policy) - V + potential
    run.result("shaping_moves_values_by_more", abs(moved).max() / magnitude(V), target=1e-8, higher=False)


def magnitude(x: np.ndarray) -> float:
    """What an error in x is a part of."""
    return float(abs(x).max()) or 1.0


def judge_unbiased(run, truth: np.ndarray, moments: dict[str, Moments], size: float) -> None:
    z = {}
    for critic in ("exact", "half_learned"):
        off = chi_square_z(
            both(critic, moments, Moments.mean) - truth, both(critic, moments, Moments.variance_of_mean), size
        )
        z[critic] = dict(zip(ESTIMATORS, off, strict=True))
    worst = max(z["exact"][name] for name in UNBIASED)
    bar = critical_z(len(UNBIASED))
    run.result("exact_critic_z", worst, baseline=z["half_learned"]["td"], target=bar, higher=False)


def judge_gradients(run, slopes: Slopes, drawn: bool) -> None:
    """How much a baseline saves depends on the rewards: in an MDP of one's own that has no bar."""
    mean, wanted, variance = slopes.mean(), slopes.wanted, slopes.variance()
    z = dict(zip(GRADIENTS, slopes.z(), strict=True))
    whole = variance[GRADIENTS.index("reward_to_go")] or 1.0  # 0 where nothing is left to chance
    spread = dict(zip(GRADIENTS, variance / whole, strict=True))
    error = dict(zip(GRADIENTS, slopes.share_error(GRADIENTS.index("reward_to_go")), strict=True))
    lengths = np.linalg.norm(mean, axis=1) * np.linalg.norm(wanted)
    cosine = dict(zip(GRADIENTS, mean @ wanted / np.maximum(lengths, 1e-300), strict=True))
    worst = max(z[name] for name in UNBIASED_GRADIENTS)
    bar = critical_z(len(UNBIASED_GRADIENTS))
    run.result("gradient_z", worst, baseline=z["group_normalized"], target=bar, higher=False)
    name, bar = "optimal_baseline", 0.5 if drawn else None
    run.result(f"variance_with_{name}", spread[name], error=error[name], baseline=1.0, target=bar, higher=False)
    run.table(
        "the policy gradient by its factor: z of the mean, variance (of reward-to-go = 1), cosine with ∇J",
        [
            {
                "factor": name,
                "z": f"{z[name]:.1f}",
                "variance": uncertain(spread[name], error[name]),
                "cosine": f"{cosine[name]:.4f}",
            }
            for name in GRADIENTS
        ],
    )
    shown = [name for name in GRADIENTS if name not in RESCALED_GRADIENTS]
    plots.gradient_variance(run, {name: (spread[name], error[name]) for name in shown})


def show_estimators(
    cfg: Config, run, mdp: MDP, policy: np.ndarray, counted: np.ndarray, truth: np.ndarray, moments: dict[str, Moments]
) -> None:
    """Bias, deviation and error by estimator and critic, and what the policy gains that follows the estimates."""
    J = tables.performance(mdp, policy)

    def gain(advantages: np.ndarray) -> float:
        return tables.performance(mdp, followed(policy, advantages.reshape(policy.shape))) - J

    best = gain(truth)
    rows: list[dict[str, Any]] = [{"estimator": name} for name in ESTIMATORS]
    found: dict[str, dict[str, float]] = {}
    for critic in ("exact", "half_learned"):
        mean, variance, chance = (
            both(critic, moments, f) for f in (Moments.mean, Moments.variance, Moments.variance_of_mean)
        )
        known = counted & np.isfinite(variance[0].reshape(counted.shape))
        intervals = np.stack(gradient_bias_interval(mean - truth, policy, known, chance), 1)  # (estimators, 3)
        averaged = [moments[f"{critic}_{side}"].average_variance(known.ravel()) for side in ("on_policy", "off_policy")]
        deviation, error = (np.concatenate(part) for part in zip(*averaged, strict=True))
        deviation = np.sqrt(deviation)
        error = np.divide(error, 2 * deviation, out=np.zeros_like(error), where=deviation > 0)
        for row, name, (b, low, high), d, e, m in zip(rows, ESTIMATORS, intervals, deviation, error, mean, strict=True):
            share = gain(m) / best if best else 0.0
            off = uncertain(b, (high - low) / 2) if low else f"0 within {high:.2g}"
            row |= {f"bias, {LABELS[critic]}": off, f"deviation, {LABELS[critic]}": f"{d:.2f}"}
            if critic == "half_learned":
                row |= {"gain": f"{share:.0%}"}
                found[name] = {"bias": b, "low": low, "high": high, "deviation": d}
                run.result(f"bias_{name}", b, error=(high - low) / 2)
                run.result(f"deviation_{name}", d, error=e)
                if name == "gae":
                    draw = numpy_generator(run, "gain").standard_normal((32, len(m)))
                    noise = np.sqrt(np.where(known.ravel(), chance[ESTIMATORS.index(name)], 0.0))
                    around = float(np.std([gain(m + d * noise) for d in draw])) / abs(best) if best else None
                    target = 0.8 if cfg.data is None else None
                    run.result("gain_gae", share, error=around, baseline=0.0, target=target)
    run.table(
        "estimates of A^π by critic, bias ± its standard error; gain: of J, by following them once, of what A^π itself "
        "gains",
        rows,
    )
    series = run.metrics.series()
    run.table(
        "mean square error of the mean of n estimates from each state, half-learned V",
        [{"estimator": name} | mse_at(series[f"error_{name}"], cfg.groups * cfg.group) for name in ESTIMATORS],
    )
    plots.estimators(run, found, ESTIMATORS)
    plots.errors(run, cfg.groups * cfg.group, ESTIMATORS)


def mse_at(curve: tuple[list[int], list[float]], per_step: int) -> dict[str, str]:
    """At n = 1k and 10k, as far as the run got."""
    errors = {(step + 1) * per_step: error for step, error in zip(*curve, strict=True)}
    reached = {f"{k}k": -(-1000 * k // per_step) * per_step for k in (1, 10)}  # whole batches
    return {f"n = {name}": f"{errors[n] ** 2:.2g}" if n in errors else "–" for name, n in reached.items()}


LABELS = {"exact": "exact V", "half_learned": "half-learned V"}


def followed(policy: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """π' ∝ π · exp(Â): a step of the natural gradient on the softmax's logits."""
    weights = policy * np.exp(advantages - advantages.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def softmax(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    weights = np.where(allowed, np.exp(logits), 0.0)
    return weights / weights.sum(1, keepdims=True)


def load(cfg: Config, run) -> MDP:
    if cfg.data is not None:
        return tables.load(cfg.data, cfg.gamma, run.print)
    draw = numpy_generator(run, "mdp")
    return tables.garnet(
        cfg.states, cfg.actions, cfg.branching, draw, cfg.gamma, reach=cfg.reach, mean=1.0, ending=cfg.ending
    )
