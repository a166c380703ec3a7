"""Advantages: eleven estimators against the exact A^π, the policy gradients they give, rescaling, credit by token.

    A^π(s, a) = Q^π(s, a) − V^π(s)        ∇J = Σ_t γ^t E[∇ log π(a_t|s_t) · A_t]

The MDP is small enough to know V, Q, A and ∇J exactly. Each estimator is a function of estimators.py; the README
explains every metric.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.rl.agents.reward_scale import RewardScale
from finetune.rl.envs.rollout import Rollout, numpy_generator
from finetune.rl.statistics import Moments, chi_square_z, critical_z, gradient_bias, gradient_bias_interval
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP, evaluate
from finetune.rl.tabular.sample import sample_tabular
from finetune.runs import config
from finetune.runs.display import uncertain
from finetune.runs.run import Run

from . import dueling, exact_cases, gradients, plots, rescaling, token_credit
from .estimators import ESTIMATORS, OFF_POLICY, ON_POLICY, UNBIASED, Batch

CRITICS = {"exact": "exact V", "half_learned": "half-learned V"}


@dataclass
class Config(config.Config):
    threads: int = 1  # the tables are small
    steps: int = 320  # batches of rollouts
    checkpoint_every: int = 100
    # steps of a rollout; what lies behind is worth what the critic says
    length: int = config.bounded(96, at_least=1, at_most=10**6)
    groups: int = config.bounded(8, at_least=1, at_most=10**6)  # groups a batch from each state
    group: int = config.bounded(4, at_least=2, at_most=10**6)  # rollouts of a group
    shuffle_rewards: bool = False  # control: the rewards of a batch are permuted, so there is nothing to learn
    # --- Estimators
    n: int = config.bounded(4, at_least=1, at_most=10**6)  # rewards of the n-step estimate
    lam: float = config.bounded(0.9, at_least=0, at_most=1)  # of GAE, Retrace and tree-backup
    # the half-learned critic: this many sweeps of policy evaluation from zero
    sweeps: int = config.bounded(2, at_least=0, at_most=10**6)
    # --- Random MDP
    data: Path | None = None  # an MDP in an npz, as the module mdp reads it; none: a random one from the seed
    states: int = config.bounded(12, at_least=1, at_most=2000)  # in addition to the terminal one
    actions: int = config.bounded(3, at_least=2, at_most=1000)
    branching: int = config.bounded(2, at_least=1, at_most=1000)  # states that a pair may lead to
    reach: int = config.bounded(3, at_least=1, at_most=1000)  # how far a step may go on the ring of states
    ending: float = config.bounded(0.02, at_least=0, at_most=1)  # probability that a step ends the episode
    gamma: float = config.bounded(0.9, at_least=0, below=1)  # below 1, as rollouts are cut somewhere
    # --- Credit by token
    # length of the longest answer; all answers are listed
    tokens: int = config.bounded(6, at_least=4, at_most=9)
    beta: float = config.bounded(0.05, at_least=0, at_most=1000)  # weight of the KL penalty on each token

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=60, states=8)


def main(cfg: Config, run: Run) -> dict[str, Any]:
    mdp = load(cfg, run)
    counted = mdp.allowed & ~mdp.terminal[:, None]  # (S, A)
    policy = softmax(numpy_generator(run, "policy").standard_normal(mdp.size), mdp.allowed)
    behavior = tables.uniform(mdp)  # of the off-policy rollouts
    V = tables.solve(mdp, policy)
    truth = np.where(counted, tables.action_values(mdp, V) - V[:, None], 0.0).ravel()  # (S·A,)
    critics = {"exact": V, "half_learned": evaluate(mdp, policy, np.zeros(len(V)), cfg.sweeps)}
    sides = {"on_policy": (ON_POLICY, policy), "off_policy": (OFF_POLICY, behavior)}
    moments = {f"{c}_{side}": Moments(len(names), counted.size) for c in critics for side, (names, _) in sides.items()}
    gradient = gradients.GradientMoments(
        gradients.exact_gradient(mdp, policy, cfg.length), numpy_generator(run, "directions")
    )
    scale = RewardScale(8 * cfg.groups * cfg.group, mdp.gamma)
    first_states = np.repeat(np.flatnonzero(~mdp.terminal), cfg.groups * cfg.group)

    for step in run.steps(cfg.steps, moments | {"gradients": gradient, "scale": scale}):
        rng = numpy_generator(run, "rollout", step)
        rollouts = {side: sample_tabular(mdp, mu, cfg.length, first_states, rng) for side, (_, mu) in sides.items()}
        starts = rng.choice(len(mdp.start), 8 * cfg.groups, p=mdp.start).repeat(cfg.group)  # for the gradient of J
        episodes = sample_tabular(mdp, policy, cfg.length, starts, rng)
        if cfg.shuffle_rewards:
            for rollout in (*rollouts.values(), episodes):
                shuffle(rollout, rng)
        for side, (estimators, mu) in sides.items():
            for name, critic in critics.items():
                batch = Batch.of(cfg, mdp, rollouts[side], policy, mu, critic)
                moments[f"{name}_{side}"].add(
                    pairs_of(rollouts[side], mdp), torch.stack([estimate(batch) for estimate in estimators.values()])
                )
        gradient.add(gradients.sampled(cfg.group, cfg.lam, mdp, episodes, policy, V, scale))
        errors = gradient_bias(both("half_learned", moments, Moments.mean) - truth, policy, counted)
        run.log(step, **{f"error_{name}": error for name, error in zip(ESTIMATORS, errors, strict=True)})

    exact_cases.check(run, mdp, policy, counted)
    dueling.report(run, mdp, policy)
    rescaling.report(run)
    token_credit.report(run, cfg.tokens, cfg.beta, cfg.lam, cfg.gamma)
    if not cfg.steps:
        run.result("gain_gae", 0.0, baseline=0.0, target=0.8)
        return {}
    check_unbiased(run, truth, moments, float(abs(V).max()) or 1.0)
    gradients.report(run, gradient, drawn=cfg.data is None)
    report_estimators(cfg, run, mdp, policy, counted, truth, moments)
    return {}


def pairs_of(rollout: Rollout, mdp: MDP) -> Tensor:
    """The number of the first (state, action) of each rollout."""
    return rollout.observations[0] * mdp.size[1] + rollout.actions[0]


def both(critic: str, moments: dict[str, Moments], what: Callable[[Moments], np.ndarray]) -> np.ndarray:
    """(estimators, S·A) in the order of ESTIMATORS."""
    return np.concatenate([what(moments[f"{critic}_{side}"]) for side in ("on_policy", "off_policy")])


def shuffle(rollout: Rollout, rng: np.random.Generator) -> None:
    flat = rollout.rewards.flatten()
    rollout.rewards = flat[torch.from_numpy(rng.permutation(len(flat)))].view(rollout.rewards.shape)


# --- What is shown


def check_unbiased(run: Run, truth: np.ndarray, moments: dict[str, Moments], size: float) -> None:
    """With the exact critic every estimator of UNBIASED has the right mean; with the half-learned one TD has not."""
    z = {}
    for critic in CRITICS:
        error = both(critic, moments, Moments.mean) - truth
        z[critic] = dict(zip(ESTIMATORS, chi_square_z(error, both(critic, moments, Moments.variance_of_mean), size),
                             strict=True))  # fmt: skip
    worst = max(z["exact"][name] for name in UNBIASED)
    run.check("exact_critic_z", worst, at_most=critical_z(len(UNBIASED)))
    run.check("half_learned_critic_td_z", z["half_learned"]["td"])


def report_estimators(
    cfg: Config, run: Run, mdp: MDP, policy: np.ndarray, counted: np.ndarray, truth: np.ndarray,
    moments: dict[str, Moments],
) -> None:  # fmt: skip
    """Bias and standard deviation by estimator and critic, and what a policy gains by following the estimates once.
    The results are GAE's; those of the others are checks."""
    J = tables.performance(mdp, policy)

    def gain(estimates: np.ndarray) -> float:
        return tables.performance(mdp, followed(policy, estimates.reshape(policy.shape))) - J

    best = gain(truth)
    rows: list[dict[str, Any]] = [{"estimator": name} for name in ESTIMATORS]
    found: dict[str, dict[str, float]] = {}
    for critic, label in CRITICS.items():
        mean, variance, noise = (
            both(critic, moments, f) for f in (Moments.mean, Moments.variance, Moments.variance_of_mean)
        )
        known = counted & np.isfinite(variance[0].reshape(counted.shape))
        intervals = np.stack(gradient_bias_interval(mean - truth, policy, known, noise), 1)  # (estimators, 3)
        averaged = [moments[f"{critic}_{side}"].average_variance(known.ravel()) for side in ("on_policy", "off_policy")]
        spread, spread_error = (np.concatenate(part) for part in zip(*averaged, strict=True))
        std = np.sqrt(spread)
        std_error = np.divide(spread_error, 2 * std, out=np.zeros_like(std), where=std > 0)
        for i, (row, name, (bias, low, high)) in enumerate(zip(rows, ESTIMATORS, intervals, strict=True)):
            shown = uncertain(bias, (high - low) / 2) if low else f"0 within {high:.2g}"
            row |= {f"bias, {label}": shown, f"std, {label}": f"{std[i]:.2f}"}
            if critic == "half_learned":
                row |= {"gain": f"{gain(mean[i]) / best if best else 0.0:.0%}"}
                found[name] = {"bias": bias, "low": low, "high": high, "bias_error": (high - low) / 2, "std": std[i],
                               "std_error": std_error[i]}  # fmt: skip
    for name, f in found.items():  # mean, noise: of the half-learned critic
        if name != "gae":
            run.check(f"bias_{name}", f["bias"], error=f["bias_error"])
            run.check(f"std_{name}", f["std"], error=f["std_error"])
    f, i = found["gae"], list(ESTIMATORS).index("gae")
    rng = numpy_generator(run, "gain").standard_normal((32, len(mean[i])))
    deviation = np.sqrt(np.where(known.ravel(), noise[i], 0.0))
    around = float(np.std([gain(mean[i] + z * deviation) for z in rng])) / abs(best) if best else None
    target = 0.8 if cfg.data is None else None
    run.result("gain_gae", gain(mean[i]) / best if best else 0.0, error=around, baseline=0.0, target=target)
    run.result("bias_gae", f["bias"], error=f["bias_error"], baseline=found["td"]["bias"], higher=False)
    run.result("std_gae", f["std"], error=f["std_error"], baseline=found["mc"]["std"], higher=False)
    run.table(
        "estimates of A^π by critic: bias ± standard error, standard deviation of one estimate; gain of J by following "
        "them once, relative to A^π itself",
        rows,
    )
    series = run.metrics.series()
    run.table(
        "mean square error of the mean of n estimates from each state, half-learned V",
        [{"estimator": name} | mse_at(series[f"error_{name}"], cfg.groups * cfg.group) for name in ESTIMATORS],
    )
    plots.estimators(run, found)
    plots.errors(run, cfg.groups * cfg.group, list(ESTIMATORS))


def mse_at(curve: tuple[list[int], list[float]], per_step: int) -> dict[str, str]:
    """The mean square error at n = 1k and 10k, as far as the run got."""
    errors = {(step + 1) * per_step: error for step, error in zip(*curve, strict=True)}
    sizes = {f"{k}k": -(-1000 * k // per_step) * per_step for k in (1, 10)}  # whole batches
    return {f"n = {name}": f"{errors[n] ** 2:.2g}" if n in errors else "–" for name, n in sizes.items()}


def followed(policy: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """π' ∝ π · exp(A): a step of the natural gradient on the softmax's logits."""
    weights = policy * np.exp(advantages - advantages.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def softmax(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    weights = np.where(allowed, np.exp(logits), 0.0)
    return weights / weights.sum(1, keepdims=True)


def load(cfg: Config, run: Run) -> MDP:
    if cfg.data is not None:
        return tables.load(cfg.data, cfg.gamma, run.print)
    rng = numpy_generator(run, "mdp")
    return tables.garnet(
        cfg.states, cfg.actions, cfg.branching, rng, cfg.gamma, reach=cfg.reach, mean=1.0, ending=cfg.ending
    )
