"""The advantage module: gradients against automatic differentiation, the optimal baseline, the run and its controls."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from resumed import resumes_to_the_same_bytes

from finetune import registry
from finetune.errors import UserError
from finetune.rl import mdp as tables
from finetune.run import execute

INFO = registry.find("advantage")
advantage = registry.load(INFO)
gradients = sys.modules["finetune_modules.advantage.gradients"]


def toy(**changes):
    return dataclasses.replace(advantage.Config.toy(), threads=1, **changes)


def case():
    draw = np.random.default_rng(0)
    mdp = tables.garnet(5, 3, 2, draw, 0.9, ending=0.1)
    return mdp, draw.normal(size=(6, 3))


def test_the_exact_gradient_is_that_of_the_performance():
    """Autograd through V = (I − γ P_π)⁻¹ R_π."""
    mdp, logits = case()
    theta = torch.tensor(logits, requires_grad=True)
    policy = theta.softmax(1)
    P = torch.einsum("sa,sat->st", policy, torch.tensor(mdp.P))
    V = torch.linalg.solve(torch.eye(6) - mdp.gamma * P, (policy * torch.tensor(mdp.R)).sum(1))
    (torch.tensor(mdp.start) @ V).backward()
    found = gradients.exact_gradient(mdp, policy.detach().numpy(), 2000)
    assert np.allclose(found, theta.grad.numpy(), atol=1e-12)


def test_no_baseline_leaves_less_variance_than_the_optimal_one():
    mdp, logits = case()
    policy = torch.tensor(logits).softmax(1).numpy()
    V = tables.solve(mdp, policy)
    Q = tables.action_values(mdp, V)
    length = 1 - 2 * policy + (policy**2).sum(1, keepdims=True)

    def left(b):
        return (policy * length * (Q - b[:, None]) ** 2).sum(1)

    best = gradients.optimal_baseline(mdp, policy, V)
    for other in (V, best + 0.01, best - 0.01, np.zeros(6)):
        assert (left(best) <= left(other) + 1e-12).all()
    assert left(best)[:5].sum() < left(V)[:5].sum()


def test_the_toy_reaches_its_targets(tmp_path):
    summary = execute(INFO, toy(), tmp_path / "run", toy=True)
    assert summary["passed"], summary["reached"]
    found = summary["metrics"]
    assert found["deviation_td"] < found["deviation_gae"] < found["deviation_mc"] < found["deviation_importance"]
    for name in ("estimators", "error_over_samples", "gradient_variance"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("change", [{"steps": 0}, {"shuffle_rewards": True}])
def test_without_steps_or_rewards_nothing_is_gained(change, tmp_path):
    summary = execute(INFO, toy(**{"steps": 30} | change), tmp_path / "run", toy=True)
    assert not summary["reached"]["gain_gae"]
    assert abs(summary["metrics"]["gain_gae"]) < 0.3


def test_a_cut_run_resumes(tmp_path):
    resumes_to_the_same_bytes(INFO, toy(steps=5, length=8, groups=2, checkpoint_every=2), tmp_path, 4)


def test_bad_settings_are_refused():
    for change, message in (
        ({"group": 1}, "--group 1 is too small"),
        ({"gamma": 1.0}, "--gamma 1"),
        ({"lam": -0.5}, "--lam -0.5 is not"),
    ):
        with pytest.raises(UserError, match=message):
            toy(**change)
