"""Hand-written controllers of CartPole and Pendulum, and mixtures of them with random actions, by stated quality."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Policy = Callable[[NDArray[np.float32], np.random.Generator], Any]  # observation → action


def balance(obs: NDArray[np.float32]) -> int:
    """CartPole: pushes towards where the pole falls. A return of 500 from every start."""
    x, speed, angle, turning = obs.tolist()
    return int(0.05 * x + 0.3 * speed + angle + 0.5 * turning > 0)


def swing_up(obs: NDArray[np.float32]) -> float:
    """Pendulum: pumps energy until it is up, then holds it there. A return of about −140."""
    cosine, sine, speed = obs.tolist()
    if cosine > 0.9:
        torque = -12 * math.atan2(sine, cosine) - 3 * speed
    else:
        missing = 5 * (1 - cosine) - speed * speed / 6  # energy to the top, for m = l = 1, g = 10
        torque = 3 * missing * (1 if speed >= 0 else -1)
    return min(max(torque, -2.0), 2.0)


def _pushes(wrong: float) -> Callable[[float], Policy]:
    """`balance`, with the other action taken with probability `wrong`."""
    return lambda progress: lambda obs, rng: int(balance(obs) ^ int(rng.random() < wrong))


def _torques(first: float, last: float) -> Callable[[float], Policy]:
    """`swing_up` with noise, or a uniform torque; the share of uniform ones changes from `first` to `last`."""

    def at(progress: float) -> Policy:
        part = first + (last - first) * progress

        def act(obs: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
            torque = rng.uniform(-2, 2) if rng.random() < part else swing_up(obs) + rng.normal(0, 0.3)
            return np.clip([torque], -2, 2).astype(np.float32)

        return act

    return at


# Environment → quality → progress of the collection, 0 … 1 → the behavior policy at that time.
SETS: dict[str, dict[str, Callable[[float], Policy]]] = {
    "CartPole-v1": {
        "random": _pushes(0.5),
        "expert": _pushes(0.0),  # narrow: never a wrong action
        "medium": _pushes(0.25),  # every second action is a random one
        "mixed": _pushes(0.6),  # most actions are wrong
    },
    "Pendulum-v1": {
        "random": _torques(1.0, 1.0),
        "expert": _torques(0.0, 0.0),
        "medium": _torques(0.5, 0.5),
        "mixed": _torques(1.0, 0.0),  # like the replay of an agent that learns
    },
}
