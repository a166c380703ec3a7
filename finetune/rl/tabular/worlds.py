"""Named small MDPs: the examples of Sutton & Barto, and gymnasium's environments with a table of transitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from finetune.errors import UserError, nearest
from finetune.rl.tabular.gymnasium_tables import from_gymnasium
from finetune.rl.tabular.mdp import MDP, Array, make

ARROWS = ("↑", "→", "↓", "←")
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))


def gridworld(gamma: float = 0.9) -> MDP:
    """Example 3.5: 5 × 5 cells, −1 for a step into the wall; A pays 10 and leads to A', B pays 5 and leads to B'."""
    P, R = np.zeros((25, 4, 25)), np.zeros((25, 4))
    for s in range(25):
        for a, (down, right) in enumerate(MOVES):
            row, column = s // 5 + down, s % 5 + right
            inside = 0 <= row < 5 and 0 <= column < 5
            P[s, a, row * 5 + column if inside else s] = 1
            R[s, a] = 0 if inside else -1
    for special, after, reward in ((1, 21, 10), (3, 13, 5)):
        P[special], R[special] = np.eye(25)[after], reward
    return make(P, R, gamma, actions=ARROWS, shape=(5, 5), name="gridworld")


def small_gridworld(gamma: float = 1.0) -> MDP:
    """Example 4.1: 4 × 4 cells, −1 per step until one of two corners is reached."""
    P = np.zeros((16, 4, 16))
    for s in range(16):
        for a, (down, right) in enumerate(MOVES):
            row, column = min(max(s // 4 + down, 0), 3), min(max(s % 4 + right, 0), 3)
            P[s, a, row * 4 + column] = 1
    ends = [s in (0, 15) for s in range(16)]
    return make(P, -np.ones((16, 4)), gamma, terminal=ends, actions=ARROWS, shape=(4, 4), name="small_gridworld")


def car_rental(gamma: float = 0.9, most: int = 20, moved: int = 5) -> MDP:
    """Example 4.2, Jack's car rental: two locations with up to `most` cars each. A rented car pays 10; up to `moved`
    cars are moved overnight, at a cost of 2 each.

    State: (cars at the first location) · (most + 1) + (cars at the second). Action a moves a − `moved` cars from the
    first to the second. Requests and returns are Poisson; the whole tail is assigned to the last case.
    """
    n = most + 1
    days = [_one_location(most, requests, returns) for requests, returns in ((3, 3), (4, 2))]
    P, R = np.zeros((n * n, 2 * moved + 1, n * n)), np.zeros((n * n, 2 * moved + 1))
    allowed = np.zeros(R.shape, bool)
    for first in range(n):
        for second in range(n):
            for action, cars in enumerate(range(-moved, moved + 1)):
                if -second <= cars <= first:
                    here, there = min(first - cars, most), min(second + cars, most)
                    s = first * n + second
                    allowed[s, action] = True
                    P[s, action] = np.outer(days[0][0][here], days[1][0][there]).ravel()
                    R[s, action] = 10 * (days[0][1][here] + days[1][1][there]) - 2 * abs(cars)
    P /= np.where(allowed, P.sum(2), 1)[:, :, None]
    names = tuple(f"{cars:+d}" if cars else "0" for cars in range(-moved, moved + 1))
    return make(P, R, gamma, allowed=allowed, actions=names, name="car_rental")


def _one_location(most: int, requests: float, returns: float) -> tuple[Array, Array]:
    """One day at a location: transition matrix of its cars, and expected rentals by the cars in the morning."""
    count = np.arange(most + 1)
    asked, back = (np.array([math.exp(-m) * m**k / math.factorial(k) for k in count]) for m in (requests, returns))
    day, rented = np.zeros((most + 1, most + 1)), np.zeros(most + 1)
    for cars in count:
        out = np.append(asked[:cars], 1 - asked[:cars].sum())  # out[k]: k rented; the last is k or more asked for
        rented[cars] = out @ count[: cars + 1]
        for k in range(cars + 1):
            left = cars - k
            returned = np.append(back[: most - left], 1 - back[: most - left].sum())
            day[cars, left:] += out[k] * returned
    return day, rented


def gambler(gamma: float = 1.0, heads: float = 0.4, goal: int = 100) -> MDP:
    """Example 4.3, the gambler: stakes on coin flips until 0 or the goal, which pays 1. Action a stakes a + 1."""
    P, R = np.zeros((goal + 1, goal // 2, goal + 1)), np.zeros((goal + 1, goal // 2, goal + 1))
    allowed = np.zeros((goal + 1, goal // 2), bool)
    R[:, :, goal] = 1
    for s in range(1, goal):
        for stake in range(1, min(s, goal - s) + 1):
            allowed[s, stake - 1] = True
            P[s, stake - 1, s + stake] = heads
            P[s, stake - 1, s - stake] = 1 - heads
    allowed[[0, goal], 0] = True
    P[0, 0, 0] = P[goal, 0, goal] = 1
    ends = [s in (0, goal) for s in range(goal + 1)]
    names = tuple(str(stake + 1) for stake in range(goal // 2))
    return make(P, R, gamma, terminal=ends, allowed=allowed, actions=names, name="gambler")


def random_walk(states: int = 5, left: float = 0.0, right: float = 1.0, gamma: float = 1.0) -> MDP:
    """The random walk of Example 6.2 (5 states, rewards 0 and 1 at the ends) and 7.1 (19 states, −1 and 1): the only
    action moves left or right with probability ½. It starts in the middle; states 0 and `states` + 1 are terminal."""
    n = states + 2
    P, R = np.zeros((n, 1, n)), np.zeros((n, 1, n))
    for s in range(1, n - 1):
        P[s, 0, [s - 1, s + 1]] = 0.5
    P[0, 0, 0] = P[-1, 0, -1] = 1
    R[1, 0, 0], R[n - 2, 0, n - 1] = left, right
    ends = [s in (0, n - 1) for s in range(n)]
    start = np.eye(n)[n // 2]
    return make(P, R, gamma, terminal=ends, start=start, actions=("step",), shape=(1, n), name=f"random_walk_{states}")


def maximization_bias(gamma: float = 1.0, actions: int = 10) -> MDP:
    """Example 6.7: from A, right (action 1) ends with reward 0 and left leads to B, where every action ends with mean
    reward −0.1. The noise around that mean is added by `td_learning`'s environment."""
    P, R = np.zeros((3, actions, 3)), np.zeros((3, actions))
    P[0, 0, 1] = P[0, 1, 2] = 1
    P[1:, :, 2] = 1
    R[1] = -0.1
    allowed = np.ones((3, actions), bool)
    allowed[0, 2:] = False
    return make(P, R, gamma, allowed=allowed, start=[1, 0, 0], terminal=[False, False, True], name="maximization_bias")


def blackjack(gamma: float = 1.0) -> MDP:
    """Blackjack of Example 5.1, cards drawn with replacement. Actions: stick, hit.

    State: 100 · (usable ace) + 10 · (sum − 12) + (dealer's card) − 1, then three terminal states: lost, drawn, won.
    Sums below 12 are not states, since hitting is safe there. Episodes start uniformly; a natural is a plain 21.
    """
    card = np.array([0] + [1 / 13] * 9 + [4 / 13])  # of ace, 2, …, ten
    after: dict[tuple[int, bool], Array] = {}  # (dealer's sum, usable ace) → probabilities of 17 … 21, bust

    def dealt(total: int, usable: bool, k: int) -> tuple[int, bool]:
        total, usable = (total + 11, True) if k == 1 and total + 11 <= 21 else (total + k, usable)
        return (total - 10, False) if usable and total > 21 else (total, usable)

    def dealer(total: int, usable: bool) -> Array:
        if total >= 17:
            return np.eye(6)[min(total - 17, 5)]
        if (total, usable) not in after:
            after[total, usable] = sum((card[k] * dealer(*dealt(total, usable, k)) for k in range(1, 11)), np.zeros(6))
        return after[total, usable]

    P, R = np.zeros((203, 2, 203)), np.zeros((203, 2, 203))
    R[:, :, 200], R[:, :, 202] = -1, 1
    P[200:, :, 200:] = np.eye(3)[:, None]
    for s in range(200):
        usable, total, shown = bool(s // 100), s // 10 % 10 + 12, s % 10 + 1
        ends = dealer(*dealt(0, False, shown))
        below = max(total - 17, 0)
        drawn = ends[below] if total >= 17 else 0.0
        P[s, 0, 200:] = ends[below:5].sum() - drawn, drawn, ends[:below].sum() + ends[5]
        for k in range(1, 11):
            new_total, still = dealt(total, usable, k)
            P[s, 1, 200 if new_total > 21 else 100 * still + 10 * (new_total - 12) + shown - 1] += card[k]
    return make(P, R, gamma, terminal=np.arange(203) >= 200, actions=("stick", "hit"), name="blackjack")


def one_state_loop(gamma: float = 1.0) -> MDP:
    """Example 5.5: left (action 0) returns with probability 0.9, otherwise ends with reward 1; right ends with 0."""
    P, R = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    P[0] = [[0.9, 0.1], [0.0, 1.0]]
    P[1, :, 1] = R[0, 0, 1] = 1
    return make(P, R, gamma, terminal=[False, True], start=[1, 0], actions=("left", "right"), name="one_state_loop")


def access_control(gamma: float = 0.99, servers: int = 10, free: float = 0.06) -> MDP:
    """Example 10.2, access control: a queue that never empties, without a terminal state. Actions: reject, accept.

    The head of the queue pays 1, 2, 4 or 8, equally likely, if it is accepted, which needs a free server. Each busy
    server, the one just taken included, becomes free with probability `free` per step.
    State: 4 · (free servers) + (priority of the head).
    """
    n = servers + 1
    done = np.zeros((n, n))  # [free before, free after]
    for idle in range(n):
        busy = servers - idle
        for k in range(busy + 1):
            done[idle, idle + k] = math.comb(busy, k) * free**k * (1 - free) ** (busy - k)
    after = np.repeat(done, 4, axis=1) / 4  # (free servers, next state)
    P, R, allowed = np.zeros((4 * n, 2, 4 * n)), np.zeros((4 * n, 2)), np.ones((4 * n, 2), bool)
    for s in range(4 * n):
        idle, priority = divmod(s, 4)
        P[s, 0], R[s, 1], allowed[s, 1] = after[idle], 2**priority, idle > 0
        if idle:
            P[s, 1] = after[idle - 1]
    return make(P, R, gamma, allowed=allowed, actions=("reject", "accept"), name="access_control")


# Tables printed in the book: V of the random policy, V*, and iterative policy evaluation after k sweeps.
EXAMPLE_3_5 = np.array([[3.3, 8.8, 4.4, 5.3, 1.5], [1.5, 3.0, 2.3, 1.9, 0.5], [0.1, 0.7, 0.7, 0.4, -0.4],
                        [-1.0, -0.4, -0.4, -0.6, -1.2], [-1.9, -1.3, -1.2, -1.4, -2.0]])  # fmt: skip
EXAMPLE_3_8 = np.array([[22.0, 24.4, 22.0, 19.4, 17.5], [19.8, 22.0, 19.8, 17.8, 16.0], [17.8, 19.8, 17.8, 16.0, 14.4],
                        [16.0, 17.8, 16.0, 14.4, 13.0], [14.4, 16.0, 14.4, 13.0, 11.7]])  # fmt: skip
FIGURE_4_1 = {
    1: np.array([[0, -1, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, 0.0]]),
    2: np.array([[0, -1.7, -2, -2], [-1.7, -2, -2, -2], [-2, -2, -2, -1.7], [-2, -2, -1.7, 0]]),
    3: np.array([[0, -2.4, -2.9, -3], [-2.4, -2.9, -3, -2.9], [-2.9, -3, -2.9, -2.4], [-3, -2.9, -2.4, 0]]),
    10: np.array([[0, -6.1, -8.4, -9], [-6.1, -7.7, -8.4, -8.4], [-8.4, -8.4, -7.7, -6.1], [-9, -8.4, -6.1, 0]]),
    math.inf: np.array([[0, -14, -20, -22], [-14, -18, -20, -20], [-20, -20, -18, -14], [-22, -20, -14, 0.0]]),
}

# Name → what makes it with a γ and, of gymnasium's worlds, with keyword arguments; its usual γ.
WORLDS: dict[str, tuple[Callable[..., MDP], float]] = {
    "frozen_lake": (partial(from_gymnasium, "FrozenLake-v1"), 0.99),
    "frozen_lake_8x8": (partial(from_gymnasium, "FrozenLake8x8-v1"), 0.99),
    "cliff_walking": (partial(from_gymnasium, "CliffWalking-v1"), 1.0),
    "taxi": (partial(from_gymnasium, "Taxi-v4"), 1.0),
    "gridworld": (gridworld, 0.9),
    "small_gridworld": (small_gridworld, 1.0),
    "car_rental": (car_rental, 0.9),
    "gambler": (gambler, 1.0),
    "blackjack": (blackjack, 1.0),
    "access_control": (access_control, 0.99),
    "random_walk": (lambda g: random_walk(19, -1.0, 1.0, g), 1.0),
}


def world(name: str, gamma: float | None = None, args: Mapping[str, Any] | None = None) -> MDP:
    """The MDP of this name, with its usual γ or the given one. A name that is not in WORLDS is that of an environment
    (envs/creators.py). args: keyword arguments of gymnasium's."""
    args = args or {}
    if name in WORLDS:
        build, usual_gamma = WORLDS[name]
        if args and not isinstance(build, partial):
            raise UserError(f"--env-arg {next(iter(args))}: '{name}' takes none, gymnasium's worlds do")
        return build(usual_gamma if gamma is None else gamma, **args)
    try:
        return from_gymnasium(name, 0.99 if gamma is None else gamma, **args)
    except UserError as e:
        if ":" in name or not str(e).startswith("gymnasium has no"):
            raise
        raise UserError(f"{e}; the worlds here are {', '.join(WORLDS)}{nearest(name, WORLDS)}") from None
