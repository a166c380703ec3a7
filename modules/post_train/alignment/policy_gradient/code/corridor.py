"""REINFORCE on the short corridor of Sutton & Barto (example 13.1), with each baseline: world, update, loop.

Three states in a row look alike to the policy, and in the second one the actions are swapped. No deterministic policy
is good; the best one goes right with probability 2 − √2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune.rl.envs.evaluation import interval
from finetune.rl.envs.rollout import Rollout, numpy_generator
from finetune.rl.statistics import mean_and_error
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP
from finetune.rl.tabular.sample import sample_tabular
from finetune.runs.display import uncertain
from finetune.runs.run import Run

from . import plots
from .baselines import BASELINES, advantages
from .reinforce import policy_loss

if TYPE_CHECKING:
    from .main import Config

BEST_RIGHT = 2 - math.sqrt(2)  # where the value of the start, (2p − 4) / (p (1 − p)), is largest
RIGHT = 1  # the action
EPISODES, LONGEST = 8, 1000  # episodes of an update, and their time limit
REACH = 0.2  # a target: at most this part of the way from the best policy to the better ε-greedy one


def corridor() -> MDP:
    """Three states and the goal, −1 a step; the start is the leftmost."""
    P = np.zeros((4, 2, 4))
    for s, (left, right) in enumerate([(0, 1), (2, 0), (1, 3), (3, 3)]):
        P[s, 0, left] = P[s, 1, right] = 1
    rewards = np.full((4, 2), -1.0)
    rewards[3] = 0
    start = np.array([1.0, 0, 0, 0])
    return tables.make(P, rewards, 1.0, start=start, actions=("left", "right"), name="short corridor")


def value_of(right: float) -> float:
    """Exact value of the start under the policy that goes right with this probability in every state."""
    return tables.performance(corridor(), np.tile([1 - right, right], (4, 1)))


def policy_of(mdp: MDP, logits: Tensor) -> np.ndarray:
    """Softmax policy (S, A) of logits (S, A), or (A,) where all states share them."""
    return logits.expand(mdp.size).softmax(-1).numpy()


def update(
    mdp: MDP, logits: Tensor, rollout: Rollout, baseline: str, values: Tensor | None, lr: float, shift: float = 0.0
) -> None:
    """One step of REINFORCE on a table of logits, in place. `values` (S,) is the learned baseline: it moves halfway to
    the mean return of each state that was seen. `shift` is added to every reward."""
    theta = logits.clone().requires_grad_()
    params = theta.expand(mdp.size).log_softmax(-1)[rollout.observations]
    rollout.rewards = rollout.rewards + shift
    A, returns = advantages(rollout, mdp.gamma, baseline, None if values is None else values[rollout.observations])
    log_probs = params.gather(-1, rollout.actions[..., None])[..., 0]
    loss = policy_loss(log_probs, A, rollout.first_episode) / log_probs.shape[1]
    (gradient,) = torch.autograd.grad(loss, theta)
    logits -= lr * gradient
    if values is not None:
        alive = rollout.first_episode
        states, visits = rollout.observations[alive], torch.zeros_like(values)
        visits.index_add_(0, states, torch.ones(len(states), dtype=values.dtype))
        sums = torch.zeros_like(values).index_add_(0, states, returns[alive])
        values += torch.where(visits > 0, 0.5 * (sums / visits.clamp(min=1) - values), 0.0)


def train(cfg: Config, run: Run, baseline: str) -> list[np.ndarray]:
    """The policies that `--corridor-repeats` trainings from p(right) = 0.05 end with."""
    mdp = corridor()
    logits = torch.tensor([0.95, 0.05], dtype=torch.float64).log().repeat(cfg.corridor_repeats, 1)
    values = torch.zeros(cfg.corridor_repeats, 4, dtype=torch.float64)
    state = {"table": {"logits": logits, "values": values}}
    for step in run.steps(min(cfg.corridor_steps, 5 * cfg.steps), state, phase=f"corridor_{baseline}"):
        for i in range(cfg.corridor_repeats):
            rng = numpy_generator(run, "corridor", i, step)
            starts = rng.choice(len(mdp.start), EPISODES, p=mdp.start)
            rollout = sample_tabular(mdp, policy_of(mdp, logits[i]), LONGEST, starts, rng, one_episode=True)
            update(mdp, logits[i], rollout, baseline, values[i] if baseline == "learned" else None, cfg.corridor_lr)
        mean, half = interval([tables.performance(mdp, policy_of(mdp, row)) for row in logits])
        run.log(step, value=mean, half_width=half, right=logits.softmax(-1)[:, RIGHT].mean())
    return [policy_of(mdp, row) for row in logits]


def compare(cfg: Config, run: Run) -> None:
    """Trains with every baseline. The result is that of the learned one; the others are checked against its target."""
    best, epsilon_greedy = value_of(BEST_RIGHT), value_of(0.95)
    target = best + REACH * (epsilon_greedy - best)
    rows = []
    for baseline in BASELINES:
        trained = train(cfg, run, baseline)
        value, error = mean_and_error([[tables.performance(corridor(), policy)] for policy in trained])
        right, right_error = mean_and_error([[float(policy[0, RIGHT])] for policy in trained])
        if baseline == "learned":
            run.result("corridor_value_learned", value, error=error, baseline=value_of(0.05), target=target)
        else:
            run.check(f"corridor_value_{baseline}", value, error=error, at_least=target)
        run.check(f"corridor_right_{baseline}", right, error=right_error)
        rows.append({"policy": baseline.replace("_", " "), "p(right)": uncertain(right, right_error),
                     "value of the start": uncertain(value, error)})  # fmt: skip
    fixed = [("start of the training, ε-greedy left", 0.05), ("ε-greedy right", 0.95), ("best", BEST_RIGHT)]
    rows += [{"policy": name, "p(right)": f"{p:.3f}", "value of the start": f"{value_of(p):.2f}"} for name, p in fixed]
    run.table("the short corridor: policies learned with each baseline, ± standard error, and what they compare with",
              rows)  # fmt: skip
    if cfg.steps:
        plots.corridor(run, BASELINES, BEST_RIGHT, value_of)
