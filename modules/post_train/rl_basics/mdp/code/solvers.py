"""The iterative solvers side by side, one sweep of each at a time; a checkpoint holds their values."""

from typing import Any

import numpy as np
import torch

from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP, Array

from .modified_policy_iteration import modified
from .policy_iteration import improve
from .value_iteration import Prioritized, in_place, synchronous

ITERATIVE = ("value_iteration", "in_place", "prioritized", "modified", "policy_iteration")
CONTRACTING = ("value_iteration", "in_place", "policy_iteration")  # a sweep contracts by γ from any V


class Solvers:
    """Every iterative solver side by side, from V = 0; policy iteration from the value of the uniform policy.

    A sweep is S backups; for modified policy iteration one improvement and its evaluation sweeps; for policy iteration
    one improvement and a linear system.
    """

    def __init__(self, mdp: MDP, evaluation_sweeps: int) -> None:
        self.mdp, self.evaluation_sweeps = mdp, evaluation_sweeps
        self.policy = tables.uniform(mdp)
        self.values: dict[str, Array] = {name: np.zeros(mdp.size[0]) for name in ITERATIVE}
        self.values["policy_iteration"] = tables.solve(mdp, self.policy)
        self.queue = Prioritized(mdp, self.values["prioritized"])
        self.share = 0.0  # the largest ratio of an error to its bound so far

    def sweep(self) -> None:
        mdp, V = self.mdp, self.values
        V["value_iteration"] = synchronous(mdp, V["value_iteration"])
        V["in_place"] = in_place(mdp, V["in_place"])
        self.queue.backups(mdp.size[0])
        V["prioritized"] = self.queue.V
        V["modified"] = modified(mdp, V["modified"], self.evaluation_sweeps)
        better = improve(mdp, self.policy, V["policy_iteration"])
        if (better != self.policy).any():
            self.policy = better
            V["policy_iteration"] = tables.solve(mdp, better)

    def compare_with_bound(self, errors: dict[str, float], bounds: dict[str, float]) -> None:
        """Updates `share`. The bound is γ^k ‖V_0 − V*‖ plus rounding, which solving with I − γ P amplifies."""
        sizes = max(abs(V).max() for V in self.values.values())
        floor = np.finfo(np.float64).eps * sizes * min(1e6, 10 / max(1 - self.mdp.gamma, 1e-6))
        if floor:
            self.share = max([self.share, *(float(errors[n] / (bound + floor)) for n, bound in bounds.items())])

    def errors(self, optimal: Array) -> dict[str, float]:
        return {name: float(abs(V - optimal).max()) for name, V in self.values.items()}

    def state_dict(self) -> dict[str, Any]:
        arrays = {**self.values, "policy": self.policy, "priority": self.queue.priority}
        return {"share": self.share, **{name: torch.from_numpy(array.copy()) for name, array in arrays.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        arrays = {name: value.numpy().copy() for name, value in state.items() if name != "share"}
        self.share, self.policy, self.queue.priority = state["share"], arrays["policy"], arrays["priority"]
        self.values = {name: arrays[name] for name in ITERATIVE}
        self.queue.V = arrays["prioritized"]
