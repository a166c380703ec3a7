"""Mountain Car by semi-gradient SARSA with tile coding (Sutton & Barto 2018, sections 9.5.4 and 10.1).

w ← w + α [R + γ q(S', A', w) − q(S, A, w)] ∇q(S, A, w)        q(s, a, w) = sum of the weights of the active tiles
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetune.rl.tabular.mdp import Array


class Tiles:
    """Tile coding: `tilings` grids over a box of D dimensions, each shifted by a fraction of a tile. A point activates
    one tile of each grid.

    The shifts are 1, 3, 5, … units in the successive dimensions (Miller & Glanz 1996): equal shifts would favor the
    diagonal.
    """

    def __init__(self, low: Array, high: Array, bins: int, tilings: int) -> None:
        self.low, self.width = np.asarray(low, float), (np.asarray(high, float) - low) / bins
        self.tilings, self.side = tilings, bins + 1  # a shifted grid needs an extra tile
        odd = 2 * np.arange(len(self.low)) + 1
        self.shift = (np.arange(tilings)[:, None] * odd % tilings) / tilings  # (tilings, D) in tiles
        self.each = self.side ** len(self.low)
        self.size = tilings * self.each

    def __call__(self, points: Array) -> NDArray[np.intp]:
        """The active tiles (…, tilings) of points (…, D); points outside the box are clipped to it."""
        position = ((points - self.low) / self.width).clip(0, self.side - 1)[..., None, :] + self.shift
        cells = np.minimum(position.astype(np.intp), self.side - 1)
        index = np.ravel_multi_index(tuple(np.moveaxis(cells, -1, 0)), (self.side,) * len(self.low))
        return index + np.arange(self.tilings) * self.each


# --- Mountain Car (Example 10.1)

LOW, HIGH = np.array([-1.2, -0.07]), np.array([0.5, 0.07])


def mountain_car(state: Array, action: NDArray[np.intp]) -> tuple[Array, NDArray[np.bool_]]:
    """Next states (…, 2) and whether the goal is reached. Actions 0, 1, 2: full throttle backward, none, forward."""
    position, velocity = state[..., 0], state[..., 1]
    velocity = (velocity + 0.001 * (action - 1) - 0.0025 * np.cos(3 * position)).clip(LOW[1], HIGH[1])
    position = (position + velocity).clip(LOW[0], HIGH[0])
    velocity = np.where(position <= LOW[0], 0.0, velocity)
    return np.stack([position, velocity], -1), position >= HIGH[0]


def sarsa_mountain_car(
    alphas: Array, runs: int, episodes: int, rng: np.random.Generator, *, tilings: int = 8, limit: int = 10_000
) -> tuple[NDArray[np.intp], Array, Tiles]:
    """Semi-gradient SARSA: steps of each episode (K, runs, episodes), weights (K, runs, 3 · tiles) and the tiles.

    Greedy (ε = 0): initial values of 0 are optimistic where every step costs −1, so untried actions are explored.
    """
    tiles = Tiles(LOW, HIGH, 8, tilings)
    rate = np.repeat(alphas, runs)[:, None] / tilings
    rows = np.arange(len(rate))[:, None]
    w = np.zeros((len(rate), 3 * tiles.size))
    offsets = np.arange(3)[:, None] * tiles.size
    steps = np.full((len(rate), episodes), limit)
    age, episode = np.zeros(len(rate), np.intp), np.zeros(len(rate), np.intp)

    def start(count: int) -> Array:
        return np.stack([rng.uniform(-0.6, -0.4, count), np.zeros(count)], -1)

    def choose(state: Array) -> tuple[NDArray[np.intp], Array, NDArray[np.intp]]:
        """Greedy actions, their values and active features; ties broken evenly."""
        features = tiles(state)[:, None] + offsets  # (N, 3, tilings)
        q = w[rows[:, :, None], features].sum(2)
        ties = np.where(q == q.max(1, keepdims=True), rng.random(q.shape), -1.0)
        action = ties.argmax(1)
        return action, q[rows[:, 0], action], features[rows[:, 0], action]

    state = start(len(rate))
    action, value, features = choose(state)
    while (episode < episodes).any():
        state, goal = mountain_car(state, action)
        age += 1
        over = goal | (age >= limit)
        action, next_value, next_features = choose(state)
        delta = -1 + np.where(goal, 0.0, next_value) - value
        w[rows, features] += rate * (delta * (episode < episodes))[:, None]
        ended = np.flatnonzero(over & (episode < episodes))
        steps[ended, episode[ended]] = age[ended]
        episode += over
        age[over] = 0
        if over.any():
            state[over] = start(int(over.sum()))
            action, _, next_features = choose(state)
        features = next_features
        value = w[rows, features].sum(1)  # with the updated weights
    return steps.reshape(len(alphas), runs, episodes), w.reshape(len(alphas), runs, -1), tiles


def cost_to_go(w: Array, tiles: Tiles, points: int = 50) -> Array:
    """−max_a q over a grid of positions (columns) and velocities (rows)."""
    x, v = np.linspace(LOW[0], HIGH[0], points), np.linspace(LOW[1], HIGH[1], points)
    active = tiles(np.stack(np.meshgrid(x, v), -1))
    q = np.stack([w[active + a * tiles.size].sum(-1) for a in range(3)])
    return -q.max(0)
