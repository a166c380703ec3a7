"""Logged steps to learn from without an environment: an npz with Minari's field names, and sets of stated quality.

The file holds one row a step, episodes one behind the other:

    observations       (N, D) float     what the policy saw
    actions            (N,) int         or (N, A) float where they are continuous
    rewards            (N,) float
    terminations       (N,) bool        the episode is over, nothing can follow
    truncations        (N,) bool        cut off, something could have followed
    next_observations  (N, D) float     what the step reached

Without next_observations, observations has one row more an episode, its last, as Minari's have. Other fields are not
read. Sets of stated quality come from scripted controllers: `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.errors import UserError, nearest
from finetune.rl.advantages import returns_to_go
from finetune.rl.envs import environments, npz
from finetune.rl.envs.controllers import SETS
from finetune.rl.envs.replay import Transitions
from finetune.runs.checkpoint import atomic_write

MOST = 1e15  # of a number
FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")


@dataclass
class Dataset:
    """Made by `generate` and `load`, which check it."""

    observations: Tensor  # (N, D) float32
    actions: Tensor  # (N,) int64, or (N, A) float32
    rewards: Tensor  # (N,) float32
    next_observations: Tensor  # (N, D) float32
    terminations: Tensor  # (N,) bool
    truncations: Tensor  # (N,) bool
    name: str
    comparable: bool = True  # whether its rewards are known to be the environment's, or not known to be others

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def continuous(self) -> bool:
        return self.actions.is_floating_point()

    def transitions(self) -> Transitions:
        return Transitions(self.observations, self.actions, self.rewards, self.next_observations, self.terminations)

    @property
    def reward_size(self) -> float:
        """The largest reward, of either sign; 1 if all are 0."""
        return float(self.rewards.abs().max()) or 1.0

    def returns(self) -> list[float]:
        """Undiscounted, of the episodes that are whole; an unfinished one at the end does not count."""
        ends = (self.terminations | self.truncations).nonzero()[:, 0] + 1
        parts = self.rewards.double().tensor_split(ends)[: len(ends)]
        return [float(part.sum()) for part in parts]

    def returns_to_go(self, gamma: float) -> Tensor:
        """(N,) r_t + γ r_{t+1} + … up to the end of the episode, or of the set."""
        ends = self.terminations | self.truncations
        return returns_to_go(self.rewards.double()[:, None], ends[:, None], gamma)[:, 0].float()

    def save(self, path: Path) -> None:
        columns = {name: getattr(self, name).numpy() for name in (*FIELDS, "next_observations")}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **columns)

    def fit(self, env: environments.Env) -> Dataset:
        """The same steps with discrete actions counted from 0, whatever number the environment calls its first one.
        UserError if these are no steps of such an environment."""
        seen, taken, continuous = environments.sizes(env)
        name = env.name
        if self.continuous != continuous:
            kinds = {True: "continuous", False: "discrete"}
            raise UserError(f"{self.name}: actions are {kinds[self.continuous]}, those of {name} {kinds[continuous]}")
        if self.observations.shape[1] != seen:
            raise UserError(f"{self.name}: observations have {self.observations.shape[1]} numbers, {name}'s {seen}")
        if not continuous:
            counted = self.actions - env.start
            if bool((wrong := (counted < 0) | (counted >= taken)).any()):
                row = int(wrong.int().argmax())
                has = f"{name} has {env.start} … {env.start + taken - 1}"
                raise UserError(f"{self.name}: actions[{row}] is {int(self.actions[row])}, {has}")
            return replace(self, actions=counted)
        if self.actions.shape[1] != taken:
            raise UserError(f"{self.name}: actions have {self.actions.shape[1]} numbers, {name}'s {taken}")
        low, high = (torch.from_numpy(bound) for bound in (env.action_space.low, env.action_space.high))
        if bool(((self.actions < low) | (self.actions > high)).any()):
            raise UserError(f"{self.name}: actions beyond {low.tolist()} … {high.tolist()}, the bounds of {name}")
        return self


# --- From a file


def load(path: Path) -> Dataset:
    """UserError names the field and the first row that is wrong."""
    found, others = npz.read(path, (*FIELDS, "next_observations"))
    if missing := [name for name in FIELDS if name not in found]:
        also = ", ".join(sorted(others))[:80]
        raise UserError(
            f"{path} has no {', '.join(missing)}: it needs {', '.join(FIELDS)}{f'; it holds {also}' if also else ''}"
        )
    try:
        return _checked(found, path.stem)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def _checked(found: dict[str, NDArray[Any]], name: str) -> Dataset:
    steps = found["rewards"].shape[0] if found["rewards"].ndim else 0
    if not steps:
        raise UserError("rewards is empty")
    discrete = found["actions"].ndim == 1
    numbers, flags = ("fiu", "numbers"), ("biu", "booleans")
    if found["actions"].dtype.kind in "iu" and found["actions"].shape == (steps, 1):
        raise UserError(
            f"actions are integers of shape ({steps}, 1): classes have the shape ({steps},), numbers are floats"
        )
    wanted = {
        "observations": (2, *numbers),
        "actions": (1, "iu", "integers, or floats in rows (N, A)") if discrete else (2, *numbers),
        "rewards": (1, *numbers),
        "next_observations": (2, *numbers),
        "terminations": (1, *flags),
        "truncations": (1, *flags),
    }
    for field, array in found.items():
        dimensions, kinds, what = wanted[field]
        if array.ndim != dimensions:
            raise UserError(f"{field} has shape {array.shape}: it must have {dimensions} dimensions")
        if array.dtype.kind not in kinds:
            raise UserError(f"{field} is {array.dtype}: it must hold {what}")
        if len(array) != steps and not (field == "observations" and "next_observations" not in found):
            raise UserError(f"{field} has {len(array)} rows, rewards has {steps}")
    for field, array in found.items():
        if field == "actions" and discrete:
            continue
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                fine = np.isfinite(array.astype(np.float32))
            if not fine.all():
                row = int(np.argwhere(~fine)[0][0])
                shown = " ".join(str(array[row]).split())[:80]
                raise UserError(f"{field}[{row}] is {shown}: every number must be finite, in float32 too")
        if (far := abs(array) > MOST).any():
            row = int(np.argwhere(far)[0][0])
            raise UserError(
                f"{field}[{row}] has a number beyond ±{MOST:g}: squares of such are infinite in float32; scale it"
            )
    for field in ("terminations", "truncations"):
        if bool((wrong := (found[field] != 0) & (found[field] != 1)).any()):
            raise UserError(f"{field}[{int(wrong.argmax())}] is {found[field][wrong.argmax()]}: it must be 0 or 1")
    if discrete and (far := abs(found["actions"].astype(np.float64)) > 2**31).any():  # int64 could not hold them all
        raise UserError(f"actions[{far.argmax()}] is {found['actions'][far.argmax()]}: no environment counts so far")
    if "next_observations" not in found:
        _split(found, steps)
    if found["observations"].shape != found["next_observations"].shape:
        shapes = found["observations"].shape, found["next_observations"].shape
        raise UserError(f"observations are {shapes[0]}, next_observations {shapes[1]}")
    kind = {"actions": np.int64 if discrete else np.float32, "terminations": bool, "truncations": bool}
    columns: dict[str, Any] = {
        field: torch.from_numpy(array.astype(kind.get(field, np.float32))) for field, array in found.items()
    }
    return Dataset(**columns, name=name)


def _split(found: dict[str, NDArray[Any]], steps: int) -> None:
    """observations with one row more an episode → observations and next_observations."""
    ends = (found["terminations"] != 0) | (found["truncations"] != 0)
    episodes = int(ends.sum()) + int(not ends[-1])
    seen = found["observations"]
    if len(seen) != steps + episodes:
        raise UserError(
            f"observations has {len(seen)} rows: without next_observations it must have {steps + episodes}, "
            f"one a step and one more for each of {episodes} episodes"
        )
    before = np.arange(steps) + np.concatenate([[0], ends.cumsum()[:-1]])
    found["observations"], found["next_observations"] = seen[before], seen[before + 1]


# --- Sets of stated quality


def generate(env: str, quality: str, steps: int, seed: int) -> Dataset:
    """Whole episodes, until there are at least so many steps. The same seed gives the same set."""
    if env not in SETS:
        raise UserError(f"no sets are made for '{env}', only for {', '.join(SETS)}{nearest(env, SETS)}")
    if quality not in SETS[env]:
        raise UserError(
            f"'{quality}' is none of the sets of {env}: {', '.join(SETS[env])}{nearest(quality, SETS[env])}"
        )
    world, draw = environments.make(env, 1)[0], np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    while len(rows) < steps:
        policy = SETS[env][quality](min(len(rows) / steps, 1.0))
        seen, over = world.reset(seed=int(draw.integers(2**31)))[0], False
        while not over:
            action = policy(seen, draw)
            after, reward, terminated, truncated, _ = world.step(action)
            rows.append((seen, action, reward, after, terminated, truncated))
            seen, over = after, terminated or truncated
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return _checked(dict(zip(names, columns, strict=True)), quality)
