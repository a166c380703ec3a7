"""Values linear in features: tile coding and Mountain Car; Baird's counterexample by TD, TDC and GTD2."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finetune.rl.tabular.mdp import Array

# --- Tile coding


class Tiles:
    """`tilings` grids over a box of D dimensions, each shifted by a part of a tile; of each, one tile holds a point.

    The shifts go by the odd numbers 1, 3, 5, … from dimension to dimension (Miller & Glanz 1996): even ones would
    favor the diagonal.
    """

    def __init__(self, low: Array, high: Array, bins: int, tilings: int) -> None:
        self.low, self.width = np.asarray(low, float), (np.asarray(high, float) - low) / bins
        self.tilings, self.side = tilings, bins + 1  # a shifted grid needs one tile more
        odd = 2 * np.arange(len(self.low)) + 1
        self.shift = (np.arange(tilings)[:, None] * odd % tilings) / tilings  # (tilings, D) in tiles
        self.each = self.side ** len(self.low)
        self.size = tilings * self.each

    def __call__(self, points: Array) -> NDArray[np.intp]:
        """The active tiles (…, tilings) of points (…, D); points beyond the box count as on its edge."""
        place = ((points - self.low) / self.width).clip(0, self.side - 1)[..., None, :] + self.shift
        cells = np.minimum(place.astype(np.intp), self.side - 1)
        index = np.ravel_multi_index(tuple(np.moveaxis(cells, -1, 0)), (self.side,) * len(self.low))
        return index + np.arange(self.tilings) * self.each


# --- Mountain Car (Example 10.1): semi-gradient SARSA with tile coding

LOW, HIGH = np.array([-1.2, -0.07]), np.array([0.5, 0.07])


def mountain_car(state: Array, action: NDArray[np.intp]) -> tuple[Array, NDArray[np.bool_]]:
    """Next states (…, 2) and whether the goal is reached; action 0, 1, 2 is full throttle backwards, none, forwards."""
    position, velocity = state[..., 0], state[..., 1]
    velocity = (velocity + 0.001 * (action - 1) - 0.0025 * np.cos(3 * position)).clip(LOW[1], HIGH[1])
    position = (position + velocity).clip(LOW[0], HIGH[0])
    velocity = np.where(position <= LOW[0], 0.0, velocity)
    return np.stack([position, velocity], -1), position >= HIGH[0]


def sarsa_mountain_car(
    alphas: Array, runs: int, episodes: int, draw: np.random.Generator, *, tilings: int = 8, limit: int = 10_000
) -> tuple[NDArray[np.intp], Array, Tiles]:
    """Steps of each episode (K, runs, episodes), the weights (K, runs, 3 · tiles) and the tiles. Greedy (ε = 0): with
    values of 0 at the start and a reward of −1 a step, what has not been tried looks best."""
    tiles = Tiles(LOW, HIGH, 8, tilings)
    rate = np.repeat(alphas, runs)[:, None] / tilings
    rows = np.arange(len(rate))[:, None]
    w = np.zeros((len(rate), 3 * tiles.size))
    offsets = np.arange(3)[:, None] * tiles.size
    steps = np.full((len(rate), episodes), limit)
    age, episode = np.zeros(len(rate), np.intp), np.zeros(len(rate), np.intp)

    def begin(count: int) -> Array:
        return np.stack([draw.uniform(-0.6, -0.4, count), np.zeros(count)], -1)

    def look(state: Array) -> tuple[NDArray[np.intp], Array, NDArray[np.intp]]:
        """The greedy action, its value and its features; ties broken evenly."""
        features = tiles(state)[:, None] + offsets  # (N, 3, tilings)
        q = w[rows[:, :, None], features].sum(2)
        ties = np.where(q == q.max(1, keepdims=True), draw.random(q.shape), -1.0)
        action = ties.argmax(1)
        return action, q[rows[:, 0], action], features[rows[:, 0], action]

    state = begin(len(rate))
    action, value, features = look(state)
    while (episode < episodes).any():
        state, goal = mountain_car(state, action)
        age += 1
        over = goal | (age >= limit)
        action, after, next_features = look(state)
        delta = -1 + np.where(goal, 0.0, after) - value
        w[rows, features] += rate * (delta * (episode < episodes))[:, None]
        ended = np.flatnonzero(over & (episode < episodes))
        steps[ended, episode[ended]] = age[ended]
        episode += over
        age[over] = 0
        if over.any():
            state[over] = begin(int(over.sum()))
            action, _, next_features = look(state)
        features = next_features
        value = w[rows, features].sum(1)  # by the weights as they are now
    return steps.reshape(len(alphas), runs, episodes), w.reshape(len(alphas), runs, -1), tiles


def cost_to_go(w: Array, tiles: Tiles, points: int = 50) -> Array:
    """−max_a q over a grid of positions (columns) and velocities (rows)."""
    x, v = np.linspace(LOW[0], HIGH[0], points), np.linspace(LOW[1], HIGH[1], points)
    active = tiles(np.stack(np.meshgrid(x, v), -1))
    q = np.stack([w[active + a * tiles.size].sum(-1) for a in range(3)])
    return -q.max(0)


# --- Baird's counterexample (section 11.2)

FEATURES = np.zeros((7, 8))  # v(s) = 2 w_s + w_8 in the first six states, w_7 + 2 w_8 in the seventh
FEATURES[range(6), range(6)], FEATURES[:6, 7], FEATURES[6, 6], FEATURES[6, 7] = 2, 1, 1, 2
FIRST = np.array([1, 1, 1, 1, 1, 1, 10, 1.0])
Method = Literal["td", "tdc", "gtd2"]
SOLID = 1 / 7  # how often the behavior does what the target policy always does


def baird(
    method: Method,
    runs: int,
    steps: int,
    alpha: float,
    beta: float,
    draw: np.random.Generator,
    gamma: float = 0.99,
) -> Array:
    """Off-policy learning by semi-gradient TD, TDC or GTD2: weights (steps + 1, runs, 8).

    TDC and GTD2 (Sutton et al. 2009) follow the gradient of the projected Bellman error, E[(x − γ x') xᵀ] h, where
    h = E[x xᵀ]⁻¹ E[δ x] is learned by least squares: h += β ρ (δ − hᵀx) x. GTD2 steps along it as it stands,
    w += α ρ (x − γ x') (hᵀx); TDC has put δ x, of which it is the mean, in the place of x (hᵀx).
    """
    w, h = np.tile(FIRST, (runs, 1)), np.zeros((runs, 8))
    state = draw.integers(7, size=runs)
    path = [w]
    for _ in range(steps):
        solid = draw.random(runs) < SOLID
        after = np.where(solid, 6, draw.integers(6, size=runs))
        rho = np.where(solid, 1 / SOLID, 0.0)[:, None]
        x, x_after = FEATURES[state], FEATURES[after]
        delta = (gamma * (w * x_after).sum(1) - (w * x).sum(1))[:, None]  # the rewards are 0
        along = (h * x).sum(1, keepdims=True)
        if method == "td":
            w = w + alpha * rho * delta * x
        elif method == "tdc":
            w = w + alpha * rho * (delta * x - gamma * x_after * along)
        else:
            w = w + alpha * rho * (x - gamma * x_after) * along
        h = h + beta * rho * (delta - along) * x
        path.append(w)
        state = after
    return np.stack(path)


def bellman_error(w: Array, gamma: float = 0.99) -> Array:
    """Root mean square over the seven states, which the behavior visits alike. The features can express every value
    function of them, so that projecting the error onto the features would not change it."""
    error = (
        gamma * (w @ FEATURES[6])[..., None] - w @ FEATURES.T
    )  # (…, 7): the target policy leads to the seventh state
    return np.sqrt((error**2).mean(-1))
