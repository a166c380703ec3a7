"""finetune.rl: what is sampled."""

import numpy as np
import torch

from finetune.rl import mdp as tables
from finetune.rl.rollout import sample_tabular


def garnet(**changes):
    return tables.garnet(6, 3, 2, np.random.default_rng(0), 0.9, **{"ending": 0.2} | changes)


def test_tabular_rollouts_follow_policy_table_and_start():
    mdp, draw = garnet(), np.random.default_rng(1)
    policy = draw.dirichlet(np.ones(3), 7)
    rollout = sample_tabular(mdp, policy, 60, np.zeros(2000, np.intp), draw)
    s, a, after = rollout.observations, rollout.actions, rollout.next_observations
    seen = torch.zeros(7, 3, 7).index_put_((s, a, after), torch.ones(()), accumulate=True).numpy()
    assert not seen[6].any(), "no step begins in the terminal state"
    visits = seen.sum(2)
    assert abs(visits[:6] / visits[:6].sum(1, keepdims=True) - policy[:6]).max() < 0.02
    assert abs(seen[:6] / visits[:6, :, None] - mdp.P[:6]).max() < 0.04
    assert np.array_equal(rollout.rewards.numpy(), mdp.rewards[s, a, after])
    assert torch.equal(rollout.terminated, after == 6)
    assert not rollout.truncated.any()
    goes_on = ~rollout.ends[:-1]
    assert torch.equal(s[1:][goes_on], after[:-1][goes_on])
    begun = np.bincount(s[1:][~goes_on].numpy(), minlength=7) / int((~goes_on).sum())
    assert abs(begun - mdp.start).max() < 0.02


def test_tabular_rollouts_take_the_first_actions_and_the_time_limit():
    mdp, first = garnet(ending=0.0), np.arange(300) % 3
    policy = tables.one_hot(mdp, np.zeros(6, int))
    draw = np.random.default_rng(0)
    rollout = sample_tabular(mdp, policy, 7, np.full(300, 2), draw, actions=first, limit=3)
    assert np.array_equal(rollout.actions[0].numpy(), first)
    assert not rollout.actions[1:].any()
    assert rollout.truncated.all(1).tolist() == [False, False, True, False, False, True, False]
    assert not rollout.terminated.any()
    assert torch.equal(rollout.truncated.any(1), rollout.truncated.all(1))
