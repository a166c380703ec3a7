"""Logs of tasks whose true values are known, for tests of learning from a log alone: a policy's value is exact."""

import numpy as np
import pytest
import torch
from summaries import numbers

from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.sample import sample_tabular

GAMMA = 0.8


def world(seed):
    """A drawn MDP of eight states and three actions; one more state ends the episode."""
    return tables.garnet(8, 3, 2, np.random.default_rng(seed), GAMMA, ending=0.2)


def tabular_log(path, mdp, policy, episodes=400, limit=30, seed=0):
    """Writes episodes of a policy (S, A), one after the other: numbers of states, under D4RL's names."""
    draw = np.random.default_rng(seed)
    starts = tables.pick(mdp.start.cumsum()[None], draw.random(episodes))
    r = sample_tabular(mdp, policy, limit, starts, draw, limit=limit)
    columns = {"observations": r.observations, "actions": r.actions, "rewards": r.rewards, "terminals": r.terminated,
               "timeouts": r.truncated, "next_observations": r.next_observations}  # fmt: skip
    np.savez(path, **{name: x.T.flatten().numpy() for name, x in columns.items()})


def optimal_value(mdp):
    """The largest value of any policy."""
    values = np.zeros(mdp.size[0])
    for _ in range(200):
        values = np.where(mdp.terminal, 0, tables.action_values(mdp, values).max(1))
    return tables.performance(mdp, tables.greedy(mdp, values))


def tabular_value(mdp, learner):
    """The exact value of a learner's policy, from one-hot states."""
    states = mdp.size[0]
    return tables.performance(mdp, learner.policy(torch.eye(states), torch.Generator().manual_seed(0)).double().numpy())


def check_learned_alone(summary, learners, mdp, policy, best, key):
    """Of a run on a log of `policy` alone: FQE is near the true value of every learner and of `policy`, and says of
    `best`, as is true, that it gains more than half of what there is to gain. key(name): the name of a number."""
    behavior = tables.performance(mdp, policy)
    found, gap = numbers(summary), optimal_value(mdp) - behavior
    assert set(summary["metrics"]) == {key(best)}
    assert summary["passed"] is None, "FQE is an estimate: nothing is called reached"
    observed = summary["baseline"][key(best)]
    assert observed == pytest.approx(behavior, abs=0.15 * gap)
    truth = {name: tabular_value(mdp, learner) for name, learner in learners.items()}
    assert truth[best] > behavior + gap / 2
    assert found[key(best)] > observed + gap / 2
    for name, value in (truth | {"behavior": behavior}).items():
        assert found[key(name)] == pytest.approx(value, abs=0.15 * gap), name


# --- Continuous: s uniform in −1 … 1 at every step, whatever was done; a step pays −(a − s/2)² and is the last with
# probability 0.2. Hence V^π = E r / (1 − 0.8 γ) at a random start.


def continuous_log(path, steps=4000, seed=0):
    """Writes steps of uniform actions, under Minari's names; returns the true value of that policy."""
    draw = np.random.default_rng(seed)
    seen, taken = draw.uniform(-1, 1, (steps + 1, 1)), draw.uniform(-1, 1, (steps, 1))
    over = draw.random(steps) < 0.2
    over[-1] = True
    rewards = -((taken - seen[:-1] / 2) ** 2)[:, 0]
    np.savez(path, observations=seen[:-1], actions=taken, rewards=rewards, terminations=over,
             truncations=np.zeros(steps), next_observations=seen[1:])  # fmt: skip
    return -(1 / 3 + 1 / 12) / (1 - 0.8 * GAMMA)


def continuous_value(act):
    """The true value of a deterministic policy (N, 1) → (N, 1)."""
    grid = torch.linspace(-1, 1, 401)[:, None]
    return -float((act(grid) - grid / 2).square().mean()) / (1 - 0.8 * GAMMA)
