"""rl.agents.log_alone: a log without an environment: what is held out, FQE of the behavior policy, what is said."""

import numpy as np
import pytest
import torch
from known_tasks import tabular_log, world

from finetune.errors import UserError
from finetune.rl.agents import log_alone
from finetune.rl.agents.networks import QNetwork
from finetune.rl.agents.offline import FQE
from finetune.rl.envs import logged_data
from finetune.rl.tabular import mdp as tables


def held_of(path, gamma):
    data, spaces = logged_data.load(path).alone()
    return log_alone.HeldOut.of(data, spaces.action_dim, gamma, 1.0)


def test_the_behavior_policy_is_the_next_logged_action_of_the_same_episode(tmp_path):
    arrays = {"observations": np.array([0, 1, 2, 0, 3, 1]), "actions": np.array([1, 0, 1, 0, 1, 1]),
              "rewards": np.arange(6.0), "terminations": np.arange(6) == 2, "truncations": np.arange(6) == 4,
              "next_observations": np.array([1, 2, 3, 3, 2, 0])}  # fmt: skip
    np.savez(tmp_path / "log.npz", **arrays)
    held = held_of(tmp_path / "log.npz", 0.5)
    assert held.returns == [0 + 0.5 * 1 + 0.25 * 2, 3 + 0.5 * 4]  # the unfinished episode has no return
    assert held.starts.argmax(1).tolist() == [0, 0]
    assert held.first_policy.argmax(1).tolist() == [1, 0]
    # rows 4 (cut off) and 5 (the end of the data) have no next action; row 2 is terminal and needs none
    assert held.followed.observations.argmax(1).tolist() == [0, 1, 2, 0]
    assert held.next_policy[[0, 1, 3]].argmax(1).tolist() == [0, 1, 1]
    assert held.followed.terminated.tolist() == [False, False, True, False]
    assert len(held.steps) == 6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fqe_of_the_behavior_policy_is_what_it_earned(seed, tmp_path):
    """Against the exact value, with a tabular Q-network; the log's mean return is its noisy estimate."""
    mdp = world(seed)
    policy = np.random.default_rng(seed).dirichlet(np.ones(3), 9)
    tabular_log(tmp_path / "log.npz", mdp, policy)
    held = held_of(tmp_path / "log.npz", mdp.gamma)
    torch.manual_seed(0)
    states = held.starts.shape[1]
    fqe = FQE(QNetwork(states, 3, []), held.followed, held.next_policy, gamma=mdp.gamma, lr=0.05, tau=0.1)
    rows = torch.Generator().manual_seed(0)
    for step in range(300):
        fqe.optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        fqe.update(torch.randint(len(held.followed), (256,), generator=rows))
    found = fqe.value(held.starts, held.first_policy).mean().item()
    exact, scale = tables.performance(mdp, policy), np.abs(tables.solve(mdp, policy)).max()
    assert found == pytest.approx(exact, abs=0.06 * scale)
    error = np.std(held.returns) / np.sqrt(len(held.returns))
    assert np.mean(held.returns) == pytest.approx(exact, abs=4 * error)


def test_rows_in_no_order_have_no_returns_and_no_behavior_policy(tmp_path):
    """As of CORL's files whose rows were shuffled: every row may be a start, and what the log earned is unknown."""
    draw, said = np.random.default_rng(0), []
    seen = draw.normal(size=(40, 3))
    np.savez(tmp_path / "log.npz", observations=seen, next_observations=seen + draw.normal(size=(40, 3)),
             actions=draw.integers(0, 2, 40), rewards=np.ones(40), terminals=draw.random(40) < 0.2)  # fmt: skip
    data = logged_data.load(tmp_path / "log.npz", report=said.append)
    assert "format corl" in said[0]
    assert "its rows are in no order" in said[0]
    assert data.returns() == []
    with pytest.raises(UserError, match="its rows are in no order"):
        data.returns_to_go(0.9)
    held = log_alone.HeldOut.of(data, 2, 0.9, 1.0)
    assert (len(held.starts), held.returns, len(held.followed)) == (40, [], 0)


def test_settings_of_a_log_alone_are_refused_without_one():
    log_alone.check_settings(True, {"--states": 3}, 5)
    for alone, settings, steps, message in (
        (False, {"--states": 3}, 5, "--states is for learning from a log alone"),
        (True, {}, 0, "--fqe-steps 0: without an environment"),
    ):
        with pytest.raises(UserError, match=message):
            log_alone.check_settings(alone, settings, steps)
