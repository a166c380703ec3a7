"""The mdp module: what a run claims, shows and refuses."""

import csv
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune.errors import UserError
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("mdp")
main = registry.load(INFO)
policy_iteration = registry.part("mdp", "policy_iteration").policy_iteration
PICTURES = ("values", "convergence", "gallery", "cliff_walking", "policy_evaluation", "car_rental", "gambler",
            "contraction", "average_reward", "tiger")  # fmt: skip


def run(folder, **changes):
    return execute(INFO, dataclasses.replace(main.Config.toy(), threads=1, **changes), folder, toy=True)


def own(folder, **changes):
    """A world of this test's, in a file; no grid."""
    mdp = tables.garnet(9, 3, 4, np.random.default_rng(5), 0.9)
    tables.save(mdp, folder / "own.npz")
    return {"data": folder / "own.npz", "rollouts": 400} | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mdp") / "run"
    return folder, run(folder)


def test_toy(finished):
    folder, summary = finished
    metrics, checks = summary["metrics"], summary["checks"]
    assert summary["passed"]
    assert set(metrics) == {"error_value_iteration", "share_of_bound", "start_value", "gallery_error", "gain",
                            "mild_tiger"}  # fmt: skip
    assert checks["taxi_start_value_error"]["value"] < 1e-9
    assert metrics["gallery_error"] <= 1e-8
    assert checks["book_tables_error"]["value"] < 0.0501
    assert metrics["start_value"] > 40 * summary["baseline"]["start_value"]
    with np.load(folder / "values.npz") as saved:
        lake = worlds.world("frozen_lake")
        V, Q, A = (saved[name] for name in "VQA")
        assert np.allclose(V, policy_iteration(lake)[0], rtol=0, atol=1e-12)
        assert np.allclose(lake.R + lake.gamma * lake.P @ V, Q, rtol=0, atol=1e-12)
        assert np.allclose((saved["policy"] * A).sum(1), 0, rtol=0, atol=1e-12)
        assert A.max() < 1e-9, "no action is better than the best"
    for name in PICTURES:
        assert (folder / f"{name}.png").stat().st_size > 15_000, name


def test_the_bound_holds_in_every_row(finished):
    rows = list(csv.DictReader((finished[0] / "metrics.csv").open()))
    assert len(rows) == main.Config.toy().steps
    for row in rows:
        if float(row["bound"]) > 1e-10:
            assert float(row["error_in_place"]) <= float(row["error_value_iteration"]) <= float(row["bound"])
    assert 0 < finished[1]["metrics"]["share_of_bound"] <= 1


@pytest.mark.parametrize("seed", [1, 2])
def test_a_file(tmp_path, seed):
    changes = own(tmp_path)
    summary = run(tmp_path / "run", seed=seed, **changes)
    assert summary["passed"]
    mdp = tables.load(changes["data"])
    assert summary["metrics"]["start_value"] == pytest.approx(mdp.start @ policy_iteration(mdp)[0], abs=1e-8)
    assert (tmp_path / "run/values.png").stat().st_size > 15_000
    assert not (tmp_path / "run/gallery.png").exists()


@pytest.mark.parametrize(("gamma", "steps", "scale"), [(0.999, 300, 1.0), (0.99999, 20, 1e9), (0.9, 2000, 1e-9)])
def test_a_large_gamma_is_judged_by_what_so_many_sweeps_promise(tmp_path, capsys, gamma, steps, scale):
    """And small rewards by their own size."""
    mdp = tables.garnet(9, 3, 4, np.random.default_rng(5), 0.9)
    np.savez(tmp_path / "own.npz", P=mdp.P, R=mdp.R * scale, gamma=gamma)
    summary = run(tmp_path / "run", data=tmp_path / "own.npz", rollouts=400, rollout_steps=200, steps=steps)
    assert summary["passed"]
    printed, target, baseline = capsys.readouterr().out, summary["target"], summary["baseline"]
    few = gamma > 0.99
    assert (f"{steps:,} are made (--steps)" in printed) == few
    assert ("rollouts stop after 200 steps" in printed) == few
    within = max(gamma**steps, 1e-8)
    assert target["error_value_iteration"] == pytest.approx(within * baseline["error_value_iteration"], rel=1e-6)
    program = summary["checks"]["error_linear_program"]["at_most"]
    assert program == pytest.approx(1e-8 * baseline["error_value_iteration"], rel=1e-6)
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    assert len(rows) == (steps if few else main.sweeps_needed(gamma))


def test_a_wrong_policy_is_seen_by_its_rollouts_whatever_the_size_of_rewards():
    """The deviation has no absolute part: values of 1e-12 that are wrong by a tenth do not count as right."""
    checked = {}
    fake = SimpleNamespace(check=lambda name, value, **_: checked.update({name: value}), print=lambda text: None,
                           generator=lambda *key: torch.Generator().manual_seed(0))  # fmt: skip
    for scale in (1e-12, 1.0, 1e12):
        walk = worlds.random_walk(5, 0.0, scale)
        config = SimpleNamespace(rollouts=2000, rollout_steps=500)
        main.check_rollouts(config, fake, walk, tables.uniform(walk))
        assert checked["rollout_deviation"] < 4
        wrong = dataclasses.replace(walk, R=1.3 * walk.R)  # V is of these, the rollouts are of `rewards`
        main.check_rollouts(config, fake, wrong, tables.uniform(walk))
        assert checked["rollout_deviation"] > 8


def test_without_sweeps_there_is_no_gain(tmp_path):
    summary = run(tmp_path / "run", steps=0, gallery=False)
    assert summary["passed"] is False
    missed = {name for name, reached in summary["reached"].items() if reached is False}
    broken = {name for name, check in summary["checks"].items() if not check["passed"]}
    assert missed >= {"error_value_iteration", "start_value"}
    assert broken >= {"error_in_place", "error_prioritized", "error_modified"}
    assert summary["metrics"]["error_value_iteration"] == summary["baseline"]["error_value_iteration"]


def test_what_a_checkpoint_holds_is_the_whole_state():
    """Solvers after five sweeps, saved and loaded into fresh ones: the sixth is the same."""
    mdp = tables.garnet(9, 3, 4, np.random.default_rng(5), 0.9)
    solvers = registry.part("mdp", "solvers")
    one, other = solvers.Solvers(mdp, 3), solvers.Solvers(mdp, 3)
    for _ in range(5):
        one.sweep()
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each.sweep()
    for name, value in one.state_dict().items():
        assert np.array_equal(value, other.state_dict()[name]), name


def test_rollouts_are_right_on_average():
    """The walk's return from the middle is 0 or 1 with even odds; FrozenLake's without discount is 14/17."""
    rollouts = main.rollouts
    walk = worlds.random_walk()
    returns = rollouts(walk, tables.uniform(walk), 4000, np.random.default_rng(0))
    assert set(returns) == {0.0, 1.0}
    assert abs(returns.mean() - 0.5) < 4 * 0.5 / 4000**0.5
    lake = worlds.world("frozen_lake", 1.0)
    _, policy, _ = policy_iteration(lake)
    for seed in range(3):
        returns = rollouts(lake, policy, 10_000, np.random.default_rng(seed))
        assert abs(returns.mean() - 14 / 17) < 3 * returns.std() / 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world": "frozen_lak"}, "did you mean 'frozen_lake'"),
        ({"world": "CartPole-v1"}, "has no table of transitions"),
        ({"gamma": 1.5}, "--gamma 1.5 is too large: it must be at most 1"),
        ({"rollouts": 0}, "--rollouts 0 is too small"),
        ({"horizon": 0}, "--horizon 0 is too small"),
        ({"pairs": 0}, "--pairs 0 is too small"),
        ({"world": "gridworld", "gamma": 1.0}, "does not end from state 0"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **change)


@pytest.mark.parametrize("size", [1.0, 1e-10, 1e8])
def test_a_picture_of_values_is_the_same_at_any_scale_of_the_rewards(size):
    """The same arrows, and numbers that are not all 0.00."""
    from finetune.rl.tabular.plots import optimal_actions, value_map
    from finetune.runs.plots import figure

    plain = worlds.world("gridworld")
    mdp = tables.make(
        plain.P, size * plain.rewards, plain.gamma, terminal=plain.terminal, start=plain.start, actions=plain.actions,
        shape=plain.shape,
    )  # fmt: skip
    V = policy_iteration(mdp)[0]
    arrows = optimal_actions(plain, policy_iteration(plain)[0])
    assert (optimal_actions(mdp, V) == arrows).all()
    axes = figure(4, 4)[1][0]
    value_map(axes, mdp, V, arrows)
    assert float(max((t.get_text() for t in axes.texts), key=lambda t: float(t))) == pytest.approx(V.max(), rel=0.05)
