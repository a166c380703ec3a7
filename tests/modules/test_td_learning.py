"""A run of the td_learning module: what it claims, and that it learns in any unit of reward."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from seeds import THREE
from summaries import check_values

from finetune.errors import UserError
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("td_learning")
main = registry.load(INFO)
prediction, control, textbook, figures_control, experiments = (
    registry.part("td_learning", name)
    for name in ("prediction", "control", "textbook", "figures_control", "experiments")
)


def run(folder, **changes):
    return execute(INFO, dataclasses.replace(main.Config.toy(), threads=1, **changes), folder, toy=True)


def tiny(**changes):
    """For what does not depend on how well is learned."""
    return {"steps": 3, "runs": 3, "cliff_runs": 2, "cliff_episodes": 4, "bias_runs": 3, "bias_episodes": 30,
            "car_runs": 1, "car_episodes": 2, "taxi_runs": 2, "taxi_steps": 300, "dqn_steps": 64,
            "dqn_runs": 2} | changes  # fmt: skip


# --- The unit of rewards


@pytest.mark.parametrize("factor", [100.0, 0.01])
@pytest.mark.parametrize("kind", control.KINDS)
def test_control_learns_in_any_unit_of_reward(kind, factor):
    """Along the cliff: −13 is the shortest path, an untrained policy gets a few hundred below."""
    cliff = worlds.world("cliff_walking")
    mdp = tables.make(cliff.P, factor * cliff.rewards, 1.0, terminal=cliff.terminal, start=cliff.start)
    rng = np.random.default_rng(0)
    sums = control.run_episodes(control.Learners(mdp, (kind,), 5, 0.5, 0.1, rng, limit=300), 150, rng)
    assert sums[0, :, -50:].mean() > factor * -75
    assert sums[0, :, :3].mean() < factor * -200


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_prediction_learns_in_any_unit_of_reward(factor):
    """Example 6.2's error of TD(0) with α = 0.05 after 100 episodes is 0.036, from 0.236."""
    walk = worlds.random_walk(5, 0.0, factor)
    truth, rng = tables.solve(walk, tables.uniform(walk)), np.random.default_rng(0)
    stream = prediction.sample(walk, 20, 100, rng)
    V = np.where(walk.terminal, 0.0, 0.5 * factor)
    _, td = prediction.n_step(walk, stream, V, np.ones(1, int), np.array([0.05]), truth)
    assert td[0, :, -1].mean() < 0.05 * factor
    assert td[0, :, 0].mean() > 0.2 * factor


# --- A run


def test_the_textbook_trains(tmp_path):
    """`--experiment textbook`: each loop learns, and metrics.csv has its curve."""
    summary = run(tmp_path / "run", experiment="textbook", steps=16)
    assert summary["passed"]
    assert set(summary["metrics"]) == {"error_td_0", "return_sarsa", "return_q_learning"}
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert header == ("step,error_monte_carlo,error_td_0,error_4_step_td,error_td_lambda,error_true_online_td_lambda,"
                      "return_sarsa,return_expected_sarsa,return_q_learning,return_double_q_learning")  # fmt: skip
    assert (tmp_path / "run/textbook.png").stat().st_size > 25_000


@pytest.mark.parametrize("name", ["td0", "q_learning"])
def test_the_readme_shows_the_textbooks_code(name):
    readme = (INFO.folder / "README.md").read_text(encoding="utf-8")
    assert inspect.getsource(getattr(textbook, name)).rstrip() in readme


@pytest.mark.slow
@pytest.mark.parametrize("seed", THREE)
def test_toy(tmp_path, seed):
    """The book's experiments, Taxi and DQN reach their targets; the orders of the figures hold."""
    summary = run(tmp_path / "run", seed=seed)
    checks = check_values(summary)
    broken = {name for name, check in summary["checks"].items() if not check["passed"]}
    missed = {name for name, reached in summary["reached"].items() if reached is False}
    assert summary["passed"], missed | broken
    metrics, baseline = summary["metrics"], summary["baseline"]
    assert set(metrics) == {"five_states_td", "n_step_error", "left_double_q", "cliff_sarsa", "taxi", "cartpole_all"}
    assert metrics["five_states_td"] < 0.7 * baseline["five_states_td"], "TD before Monte Carlo"
    assert checks["best_n"] in (2, 4, 8)
    assert checks["true_online_error"] < checks["td_lambda_error"] < baseline["n_step_error"]
    assert checks["left_q_learning"] > 0.08, "more than exploration, 0.05"
    assert checks["cliff_expected_sarsa"] > metrics["cliff_sarsa"] > checks["cliff_q_learning"]
    assert min(checks["cliff_tree_backup"], checks["cliff_q_sigma"]) > checks["cliff_n_step_sarsa"]
    for trace, without in (("sarsa_lambda", "sarsa"), ("q_lambda", "q_learning")):
        assert checks[f"cliff_{trace}_first_50"] > checks[f"cliff_{without}_first_50"]
    for name in ("random_walk", "bias", "baird", "dqn", "training_curves", "n_step", "lambda", "cliff",
                 "mountain_car", "batch", "importance"):  # fmt: skip
        assert (tmp_path / f"run/{name}.png").stat().st_size > 25_000, name


def test_without_learning_there_is_no_gain(tmp_path, no_pictures):
    summary = run(tmp_path / "none", **tiny(steps=0))
    assert summary["passed"] is False
    assert summary["checks"]["experiments"] == {"value": 0, "at_least": 8, "passed": False}
    still = run(tmp_path / "still", **tiny(rate=0.0, steps=2))
    assert still["metrics"]["taxi"] == summary["metrics"]["taxi"] < 0
    assert still["checks"]["baird_td_growth"]["value"] == 1
    missed = {name for name, reached in still["reached"].items() if reached is False}
    broken = {name for name, check in still["checks"].items() if not check["passed"]}
    assert missed >= {"taxi", "five_states_td"}
    assert broken >= {"baird_td_growth", "baird_tdc_error"}


def test_one_experiment_alone(tmp_path, no_pictures):
    summary = run(tmp_path / "run", **tiny(experiment="bias", steps=2, bias_runs=200))
    assert set(summary["metrics"]) == {"left_double_q"}
    assert (tmp_path / "run/metrics.csv").read_text().splitlines()[0].split(",")[1:] == [
        f"left_{kind}" for kind in figures_control.BIAS_KINDS
    ]


def test_what_a_checkpoint_holds_is_the_whole_state():
    """Taxi's learners and DQN's: after two steps, saved, and loaded into fresh ones, the third is the same."""
    mdp, runs = worlds.world("taxi"), 2

    def fresh():
        return control.Learners(mdp, ("q_learning",), runs, 1.0, 0.1, np.random.default_rng(0), limit=200)

    one, two = fresh(), fresh()
    for _ in range(300):
        one.step(rng := np.random.default_rng(1))
    two.load_state_dict(one.state_dict())
    for learners in (one, two):
        learners.step(np.random.default_rng(2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert rng is not None
    totals, other = experiments.Totals(), experiments.Totals()
    totals.add("x", np.arange(6.0).reshape(2, 3))
    other.load_state_dict(totals.state_dict())
    assert np.array_equal(other.error("x"), totals.error("x"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": 0}, "--runs 0 is too small"),
        ({"rate": 1.5}, "--rate 1.5 is too large: it must be at most 1"),
        ({"variants": "dqn,duelling"}, "'duelling' is not one of dqn, .*dueling"),
        ({"experiment": "clif"}, "--experiment 'clif': expected all|textbook"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **change)
