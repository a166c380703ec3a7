"""Gradient TD: semi-gradient TD diverges on Baird's counterexample, TDC and GTD2 do not (Sutton et al. 2009).

    TD      w ← w + α ρ δ x                                      δ = R + γ wᵀx' − wᵀx,  ρ = π/b
    TDC     w ← w + α ρ (δ x − γ x' (hᵀx))
    GTD2    w ← w + α ρ (x − γ x') (hᵀx)                         h ← h + β ρ (δ − hᵀx) x

TDC and GTD2 follow the gradient of the projected Bellman error, E[(x − γ x') xᵀ] h, where h = E[x xᵀ]⁻¹ E[δ x] is
learned by least squares. Sutton & Barto 2018, sections 11.2 and 11.7.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from finetune.rl.tabular.mdp import Array

FEATURES = np.zeros((7, 8))  # v(s) = 2 w_s + w_8 in the first six states, w_7 + 2 w_8 in the seventh
FEATURES[range(6), range(6)], FEATURES[:6, 7], FEATURES[6, 6], FEATURES[6, 7] = 2, 1, 1, 2
FIRST = np.array([1, 1, 1, 1, 1, 1, 10, 1.0])
Method = Literal["td", "tdc", "gtd2"]
SOLID = 1 / 7  # probability with which the behavior takes the action that the target policy always takes


def baird(
    method: Method,
    runs: int,
    steps: int,
    alpha: float,
    beta: float,
    rng: np.random.Generator,
    gamma: float = 0.99,
) -> Array:
    """Off-policy learning on the counterexample by semi-gradient TD, TDC or GTD2: weights (steps + 1, runs, 8)."""
    w, h = np.tile(FIRST, (runs, 1)), np.zeros((runs, 8))
    state = rng.integers(7, size=runs)
    path = [w]
    for _ in range(steps):
        solid = rng.random(runs) < SOLID
        next_state = np.where(solid, 6, rng.integers(6, size=runs))
        rho = np.where(solid, 1 / SOLID, 0.0)[:, None]
        x, next_x = FEATURES[state], FEATURES[next_state]
        delta = (gamma * (w * next_x).sum(1) - (w * x).sum(1))[:, None]  # the rewards are 0
        correction = (h * x).sum(1, keepdims=True)
        if method == "td":
            w = w + alpha * rho * delta * x
        elif method == "tdc":
            w = w + alpha * rho * (delta * x - gamma * next_x * correction)
        else:
            w = w + alpha * rho * (x - gamma * next_x) * correction
        h = h + beta * rho * (delta - correction) * x
        path.append(w)
        state = next_state
    return np.stack(path)


def bellman_error(w: Array, gamma: float = 0.99) -> Array:
    """Root mean square Bellman error over the seven states, which the behavior visits equally often. The features can
    represent every value function, so that projecting the error onto them would change nothing."""
    # the target policy leads to the seventh state
    error = gamma * (w @ FEATURES[6])[..., None] - w @ FEATURES.T  # (…, 7)
    return np.sqrt((error**2).mean(-1))
