"""Datasets of logged steps for offline RL: read from an npz with Minari's field names, or generated at a quality.

The npz holds one row a step, episode after episode:

    observations       (N, D) float     what the policy saw
    actions            (N,) int         or (N, A) float if they are continuous
    rewards            (N,) float
    terminations       (N,) bool        the episode ended: a target does not bootstrap
    truncations        (N,) bool        a time limit cut the episode off: a target bootstraps
    next_observations  (N, D) float     after the step

Without next_observations, observations has one more row per episode, its last, as Minari's datasets do. Other fields
are ignored. `generate` makes sets with hand-written controllers (controllers.py).
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

MAX_NUMBER = 1e15
FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")


@dataclass
class Dataset:
    """Logged steps, episode after episode. `generate` and `load` make and check it."""

    observations: Tensor  # (N, D) float32
    actions: Tensor  # (N,) int64, or (N, A) float32
    rewards: Tensor  # (N,) float32
    next_observations: Tensor  # (N, D) float32
    terminations: Tensor  # (N,) bool
    truncations: Tensor  # (N,) bool
    name: str

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def continuous(self) -> bool:
        return self.actions.is_floating_point()

    def transitions(self) -> Transitions:
        return Transitions(self.observations, self.actions, self.rewards, self.next_observations, self.terminations)

    @property
    def reward_size(self) -> float:
        """The largest absolute reward; 1 if all are 0."""
        return float(self.rewards.abs().max()) or 1.0

    def returns(self) -> list[float]:
        """Undiscounted returns of the whole episodes; an unfinished one at the end does not count."""
        ends = (self.terminations | self.truncations).nonzero()[:, 0] + 1
        parts = self.rewards.double().tensor_split(ends)[: len(ends)]
        return [float(part.sum()) for part in parts]

    def returns_to_go(self, gamma: float) -> Tensor:
        """(N,) r_t + γ r_{t+1} + … up to the end of the episode or of the data."""
        ends = self.terminations | self.truncations
        return returns_to_go(self.rewards.double()[:, None], ends[:, None], gamma)[:, 0].float()

    def save(self, path: Path) -> None:
        columns = {name: getattr(self, name).numpy() for name in (*FIELDS, "next_observations")}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **columns)

    def fit(self, env: environments.Env) -> Dataset:
        """The same steps with discrete actions counted from 0, whatever number the environment gives its first action.
        UserError if shapes or actions do not match the environment."""
        name = env.name
        if self.continuous != env.continuous:
            kinds = {True: "continuous", False: "discrete"}
            raise UserError(
                f"{self.name}: actions are {kinds[self.continuous]}, those of {name} {kinds[env.continuous]}"
            )
        if (dim := self.observations.shape[1]) != env.obs_dim:
            raise UserError(f"{self.name}: observations have {dim} numbers, {name}'s {env.obs_dim}")
        if not env.continuous:
            actions = self.actions - env.start
            if bool((wrong := (actions < 0) | (actions >= env.action_dim)).any()):
                row = int(wrong.int().argmax())
                has = f"{name} has {env.start} … {env.start + env.action_dim - 1}"
                raise UserError(f"{self.name}: actions[{row}] is {int(self.actions[row])}, {has}")
            return replace(self, actions=actions)
        if (dim := self.actions.shape[1]) != env.action_dim:
            raise UserError(f"{self.name}: actions have {dim} numbers, {name}'s {env.action_dim}")
        low, high = (torch.from_numpy(bound) for bound in (env.action_space.low, env.action_space.high))
        if bool(((self.actions < low) | (self.actions > high)).any()):
            raise UserError(f"{self.name}: actions beyond {low.tolist()} … {high.tolist()}, the bounds of {name}")
        return self


# --- From a file


def load(path: Path) -> Dataset:
    """The dataset of an npz file. UserError names the field and the first row that is wrong."""
    arrays, others = npz.read(path, (*FIELDS, "next_observations"))
    if missing := [name for name in FIELDS if name not in arrays]:
        also = ", ".join(sorted(others))[:80]
        raise UserError(
            f"{path} has no {', '.join(missing)}: it needs {', '.join(FIELDS)}{f'; it holds {also}' if also else ''}"
        )
    try:
        return _dataset(arrays, path.stem)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def _dataset(arrays: dict[str, NDArray[Any]], name: str) -> Dataset:
    """Checks the arrays of a file, by field, and converts them to tensors."""
    steps = arrays["rewards"].shape[0] if arrays["rewards"].ndim else 0
    if not steps:
        raise UserError("rewards is empty")
    discrete = arrays["actions"].ndim == 1
    _check_shapes(arrays, steps, discrete)
    _check_numbers(arrays, discrete)
    if "next_observations" not in arrays:
        _split_observations(arrays, steps)
    if arrays["observations"].shape != arrays["next_observations"].shape:
        shapes = arrays["observations"].shape, arrays["next_observations"].shape
        raise UserError(f"observations are {shapes[0]}, next_observations {shapes[1]}")
    dtypes = {"actions": np.int64 if discrete else np.float32, "terminations": bool, "truncations": bool}
    columns: dict[str, Any] = {
        field: torch.from_numpy(array.astype(dtypes.get(field, np.float32))) for field, array in arrays.items()
    }
    return Dataset(**columns, name=name)


def _check_shapes(arrays: dict[str, NDArray[Any]], steps: int, discrete: bool) -> None:
    """Dimensions, kinds of dtypes and numbers of rows."""
    if arrays["actions"].dtype.kind in "iu" and arrays["actions"].shape == (steps, 1):
        raise UserError(
            f"actions are integers of shape ({steps}, 1): classes have the shape ({steps},), numbers are floats"
        )
    numbers, flags = ("fiu", "numbers"), ("biu", "booleans")
    expected = {
        "observations": (2, *numbers),
        "actions": (1, "iu", "integers, or floats in rows (N, A)") if discrete else (2, *numbers),
        "rewards": (1, *numbers),
        "next_observations": (2, *numbers),
        "terminations": (1, *flags),
        "truncations": (1, *flags),
    }
    for field, array in arrays.items():
        dimensions, kinds, what = expected[field]
        if array.ndim != dimensions:
            raise UserError(f"{field} has shape {array.shape}: it must have {dimensions} dimensions")
        if array.dtype.kind not in kinds:
            raise UserError(f"{field} is {array.dtype}: it must hold {what}")
        if len(array) != steps and not (field == "observations" and "next_observations" not in arrays):
            raise UserError(f"{field} has {len(array)} rows, rewards has {steps}")


def _check_numbers(arrays: dict[str, NDArray[Any]], discrete: bool) -> None:
    """Finite numbers of a size that float32 can square, flags of 0 and 1, discrete actions that int64 can hold."""
    for field, array in arrays.items():
        if field == "actions" and discrete:
            continue
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                finite = np.isfinite(array.astype(np.float32))
            if not finite.all():
                row = int(np.argwhere(~finite)[0][0])
                shown = " ".join(str(array[row]).split())[:80]
                raise UserError(f"{field}[{row}] is {shown}: every number must be finite, in float32 too")
        if (large := abs(array) > MAX_NUMBER).any():
            row = int(np.argwhere(large)[0][0])
            raise UserError(
                f"{field}[{row}] has a number beyond ±{MAX_NUMBER:g}, whose square is infinite in float32: scale it"
            )
    for field in ("terminations", "truncations"):
        if bool((wrong := (arrays[field] != 0) & (arrays[field] != 1)).any()):
            raise UserError(f"{field}[{int(wrong.argmax())}] is {arrays[field][wrong.argmax()]}: it must be 0 or 1")
    if discrete and (large := abs(arrays["actions"].astype(np.float64)) > 2**31).any():
        row = int(large.argmax())
        raise UserError(f"actions[{row}] is {arrays['actions'][row]}: no environment has so many actions")


def _split_observations(arrays: dict[str, NDArray[Any]], steps: int) -> None:
    """observations with one more row per episode → observations and next_observations."""
    ends = (arrays["terminations"] != 0) | (arrays["truncations"] != 0)
    episodes = int(ends.sum()) + int(not ends[-1])
    observations = arrays["observations"]
    if len(observations) != steps + episodes:
        raise UserError(
            f"observations has {len(observations)} rows: without next_observations it must have {steps + episodes}, "
            f"one a step and one more for each of {episodes} episodes"
        )
    rows = np.arange(steps) + np.concatenate([[0], ends.cumsum()[:-1]])  # episode i is shifted by i rows
    arrays["observations"], arrays["next_observations"] = observations[rows], observations[rows + 1]


# --- Generated


def generate(env: str, quality: str, steps: int, seed: int) -> Dataset:
    """Whole episodes of a hand-written controller, at least `steps` steps. The same seed gives the same set."""
    if env not in SETS:
        raise UserError(f"no sets are made for '{env}', only for {', '.join(SETS)}{nearest(env, SETS)}")
    if quality not in SETS[env]:
        raise UserError(
            f"'{quality}' is none of the sets of {env}: {', '.join(SETS[env])}{nearest(quality, SETS[env])}"
        )
    world, rng = environments.make(env, 1)[0], np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    while len(rows) < steps:
        policy = SETS[env][quality](min(len(rows) / steps, 1.0))
        obs, done = world.reset(seed=int(rng.integers(2**31)))[0], False
        while not done:
            action = policy(obs, rng)
            next_obs, reward, terminated, truncated, _ = world.step(action)
            rows.append((obs, action, reward, next_obs, terminated, truncated))
            obs, done = next_obs, terminated or truncated
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return _dataset(dict(zip(names, columns, strict=True)), quality)
