"""What is known exactly: the short corridor, the enumerated gradient, other people's episodes, other coordinates."""

from __future__ import annotations

from typing import Any

import torch

from finetune.rl.envs.evaluation import interval
from finetune.rl.envs.rollout import numpy_generator
from finetune.rl.statistics import critical_z, mean_and_error
from finetune.rl.tabular import mdp as tables

from . import enumerated, offpolicy, plots, tabular, variance
from .enumerated import batch_means, by_episode, discounts, z_score
from .losses import BASELINES

FAR = 0.2  # part of the way from the best policy to the better ε-greedy one, within which what is learned has to be


def walk(cfg: Any, run, baseline: str) -> None:
    """REINFORCE on the short corridor from p(right) = 0.05, several times."""
    mdp = tabular.corridor()
    start = torch.tensor([0.95, 0.05], dtype=torch.float64).log()
    logits = start.repeat(cfg.corridor_repeats, 1)
    values = torch.zeros(cfg.corridor_repeats, 4, dtype=torch.float64)
    state = {"table": {"logits": logits, "values": values}}
    for step in run.steps(min(cfg.corridor_steps, 5 * cfg.steps), state, phase=f"corridor_{baseline}"):
        for i in range(cfg.corridor_repeats):
            draw = numpy_generator(run, "corridor", i, step)
            rollout = tabular.episodes(mdp, tabular.probabilities(mdp, logits[i]), 8, 1000, draw)
            tabular.ascend(
                mdp, logits[i], rollout, baseline, values[i] if baseline == "learned" else None, cfg.corridor_lr
            )
        found = [tables.performance(mdp, tabular.probabilities(mdp, row)) for row in logits]
        mean, half = interval(found)
        run.log(step, value=mean, half_width=half, right=logits.softmax(-1)[:, tabular.RIGHT].mean())
    policies_ = [tabular.probabilities(mdp, row) for row in logits]
    value, value_error = mean_and_error([[tables.performance(mdp, p)] for p in policies_])
    right, right_error = mean_and_error([[float(p[0, tabular.RIGHT])] for p in policies_])
    greedy = tables.performance(mdp, tabular.probabilities(mdp, start))
    best, epsilon = tabular.corridor_value(tabular.BEST_RIGHT), tabular.corridor_value(0.95)
    target = best + FAR * (epsilon - best)
    run.result(f"corridor_value_{baseline}", value, error=value_error, baseline=greedy, target=target)
    run.result(f"corridor_right_{baseline}", right, error=right_error)


def judge_corridor(cfg: Any, run) -> None:
    """The book's two ε-greedy policies, ε = 0.1: what a method of action values would end with."""
    for name, right in (("left", 0.05), ("right", 0.95)):
        run.result(f"corridor_epsilon_greedy_{name}", tabular.corridor_value(right))
    if cfg.steps:
        plots.corridor(run, BASELINES, tabular.BEST_RIGHT, tabular.corridor_value)


def judge_gradient(run, episodes: int, rows: int) -> dict[str, variance.Share]:
    """The estimate with each baseline against the enumerated gradient; the mean baseline is biased. Returns its
    variance and z by baseline."""
    listed = variance.listed(numpy_generator(run, "score"), episodes, rows)
    right = [found.z for name, found in listed.items() if name != "mean"]
    bar = critical_z(len(right))
    run.result("score_function_z", max(right), baseline=listed["mean"].z, target=bar, higher=False)
    return listed


def judge_discount(run, episodes: int) -> None:
    """With γ^t the estimate is that of ∇J; without, of a field that is no gradient at all."""
    draw = numpy_generator(run, "discount")
    mdp, logits = enumerated.process(draw)
    mdp = mdp.discounted(0.5)
    everything, world = enumerated.trajectories(mdp)
    wanted = enumerated.gradient(everything, world, logits, mdp.gamma)
    rollout = enumerated.sample(mdp, logits, episodes, draw)
    psi = enumerated.to_go(rollout, mdp.gamma)
    usual, right = (batch_means(by_episode(rollout, logits, p), 16) for p in (psi, discounts(mdp.gamma, psi) * psi))
    z, other = z_score(right, wanted), z_score(usual, wanted)
    run.result("discount_correction_z", z, baseline=other, target=critical_z(), higher=False)

    def field(x: torch.Tensor) -> torch.Tensor:
        return enumerated.usual(everything, world, x, mdp.gamma)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        J = enumerated.objective(everything, world, x, mdp.gamma)
        return torch.autograd.grad(J, x, create_graph=True)[0].flatten()

    twisted, straight = (enumerated.asymmetry(f, logits) for f in (field, gradient))
    run.result("usual_form_asymmetry", twisted, baseline=straight, target=1e-3)


def judge_off_policy(run, episodes: int) -> None:
    """Episodes of another policy, weighed six ways; then one batch of the first policy, used again and again."""
    found = offpolicy.compare(numpy_generator(run, "off_policy"), episodes)
    turned, right = offpolicy.DISTANCES.index(2.0), offpolicy.UNBIASED
    bias = max(b for way in right for b in found[way]["bias"])
    wrong, sample = found["uncorrected"], found["sample"]
    run.result("off_policy_bias", bias, baseline=wrong["bias"][turned], target=1e-10, higher=False)
    z, bar = max(found[way]["z"][turned] for way in right), critical_z(len(right))
    run.result("off_policy_z", z, baseline=wrong["z"][turned], target=bar, higher=False)
    share, error = (found["decision"][part][turned] for part in ("share", "share_error"))
    run.result("per_decision_variance", share, error=error, baseline=1.0, higher=False)
    part, error = sample["effective"][turned], sample["effective_error"][turned]
    run.result("effective_part", part, error=error, baseline=1.0, higher=False)
    paths = {w: offpolicy.reuse(numpy_generator(run, "reuse"), w) for w in ("uncorrected", "step", "decision")}
    run.result("reuse_corrected", paths["decision"][-1], baseline=paths["uncorrected"][-1])
    plots.off_policy(run, offpolicy.DISTANCES, found, paths)


def judge_invariance(run) -> None:
    """Rewards moved by 100; the natural gradient in other coordinates."""
    for baseline in ("mean", "none"):
        (before, _), (after, _) = (
            tabular.shifted(baseline, shift, [numpy_generator(run, "shift", part) for part in range(2)])
            for shift in (0.0, 100.0)
        )
        moved = float(abs(after - before).max())
        if baseline == "mean":
            run.result("shift_moves_policy_with_baseline", moved, target=1e-6, higher=False)
        else:
            run.result("shift_moves_policy_without", moved, target=0.01)
    natural, vanilla = tabular.reparametrized(run.generator("coordinates"))
    run.result("natural_gradient_invariance", natural, baseline=vanilla, target=1e-4, higher=False)
