"""The dueling decomposition (Wang et al. 2016) fitted to Q: which mean of A identifies V^π and A^π.

    Q(s, a) = V(s) + A(s, a) − m(s)     m = nothing, mean_a A (eq. 9), or Σ_a π(a|s) A

Adding c(s) to V and subtracting it from A leaves V + A unchanged. With a mean m, c(s) cancels inside A and V must be
that mean of Q: V^π with the policy's own mean, and with the plain mean only if the policy is uniform.
"""

from __future__ import annotations

import numpy as np
import torch

from finetune.rl.envs.rollout import numpy_generator
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP
from finetune.runs.run import Run

FORMS = ("none", "mean", "policy_mean")


def fit(form: str, Q: np.ndarray, policy: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """V (S,) and A − m (S, A), by gradient descent on the squared error of Q from a random start."""
    S, actions = Q.shape
    weights = {"none": 0 * policy, "mean": np.full_like(policy, 1 / actions), "policy_mean": policy}[form]
    target, w = torch.from_numpy(Q), torch.from_numpy(weights)
    V, raw = (torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in ((S, 1), (S, actions)))
    for _ in range(120 * actions):  # (1 − 0.5 / 2a)^120a = e^−30
        A = raw - (w * raw).sum(1, keepdim=True)
        loss = 0.5 * (V + A - target).square().sum()
        for x, slope in zip((V, raw), torch.autograd.grad(loss, (V, raw)), strict=True):
            x.data -= slope / (2 * actions)  # a state's Hessian: eigenvalues in 0.5 … 2a, or 0
    return V.detach().numpy()[:, 0], (raw - (w * raw).sum(1, keepdim=True)).detach().numpy()


def report(run: Run, mdp: MDP, policy: np.ndarray) -> None:
    whole = mdp.allowed.all(1) & ~mdp.terminal  # states in which every action counts
    V, Q = (x[whole] for x in (tables.solve(mdp, policy), tables.action_values(mdp, tables.solve(mdp, policy))))
    if not whole.any():
        return
    exact, rows, errors = Q - V[:, None], [], {}
    for form in FORMS:
        v, a = fit(form, Q, policy[whole], numpy_generator(run, "dueling", form))
        off = [abs(v[:, None] + a - Q).max(), abs(v - V).max(), abs(v - Q.mean(1)).max(), abs(a - exact).max()]
        errors[form] = max(off[1], off[3])
        names = ("Q", "V, from V^π", "V, from mean_a Q", "A, from A^π")
        rows.append(
            {"subtracted from A": form.replace("_", " ")} | {n: f"{x:.1e}" for n, x in zip(names, off, strict=True)}
        )
    size = max(1.0, float(abs(Q).max()))  # the fit begins at numbers near 1
    run.check("dueling_error", errors["policy_mean"], at_most=1e-8 * size)
    run.check("dueling_error_without_mean", errors["none"])
    run.table("the dueling decomposition fitted to the exact Q: largest errors", rows)
