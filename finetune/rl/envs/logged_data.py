"""Datasets of logged steps for offline RL: read from a file, or generated at a quality.

The files' formats are those of `offline_files.FORMATS`; this project's own, which `Dataset.save` writes, is an npz with
Minari's names, one row a step, episode after episode:

    observations       (N, D) float     what the policy saw; integers (N,) or (N, 1) are states, which become one-hot,
                                        uint8 of two to four axes and 8 pixels a side or more, (N, H, W, C), are images
    actions            (N,) int         or (N, A) float if they are continuous
    rewards            (N,) float
    terminations       (N,) bool        the episode ended: a target does not bootstrap
    truncations        (N,) bool        a time limit cut the episode off: a target bootstraps
    next_observations  (N, D) float     after the step

`generate` makes sets with hand-written controllers (controllers.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.errors import UserError, nearest
from finetune.rl.advantages import returns_to_go
from finetune.rl.envs import columns, environments, npz, offline_files
from finetune.rl.envs.columns import MAX_CLASSES
from finetune.rl.envs.controllers import SETS
from finetune.rl.envs.offline_files import FIELDS, Log
from finetune.rl.envs.replay import Transitions
from finetune.rl.envs.spaces import MAX_ACTIONS, Image
from finetune.runs.checkpoint import atomic_write

MARGIN = 0.01  # of the range of the logged actions: how far beyond it a policy learned from the log alone may go
COLUMNS = (*FIELDS, "next_observations")


@dataclass
class Dataset:
    """Logged steps, episode after episode. `generate` and `load` make and check it."""

    # (N, D) float32, of images the bytes (N, D); (N, 1) numbers of states until `fit` or `alone` makes them one-hot
    observations: Tensor
    # (N,) int64, or (N, A) float32; (N, A) int64 of several discrete parts, until `fit` or `alone` makes them one
    actions: Tensor
    rewards: Tensor  # (N,) float32
    next_observations: Tensor  # (N, D) of the same dtype
    terminations: Tensor  # (N,) bool
    truncations: Tensor  # (N,) bool
    name: str
    known: Tensor | None = None  # (N,) bool whether the observation after the step is known; None: everywhere
    ordered: bool = True  # whether rows are in the order of the episodes
    states: bool = False  # whether observations are numbers of states
    state_space: tuple[int, int] | None = None  # (number, first) of the states, if the file says so
    action_space: tuple[int, int] | None = None  # the same of discrete actions
    shape: tuple[int, ...] = ()  # of an observation in the file, if it has several axes

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def continuous(self) -> bool:
        return self.actions.is_floating_point()

    @property
    def image(self) -> Image | None:
        """The images that observations of bytes are."""
        return Image.of_shape(self.shape) if self.observations.dtype == torch.uint8 else None

    @property
    def ends(self) -> Tensor:
        """(N,) bool: the last steps of whole episodes."""
        return self.terminations | self.truncations

    @property
    def usable(self) -> Tensor:
        """The rows (M,) that `transitions` has."""
        return torch.arange(len(self)) if self.known is None else self.known.nonzero()[:, 0]

    def transitions(self) -> Transitions:
        """The steps after which the observation is known."""
        steps = Transitions(self.observations, self.actions, self.rewards, self.next_observations, self.terminations)
        return steps if self.known is None else steps[self.known]

    @property
    def reward_size(self) -> float:
        """The largest absolute reward; 1 if all are 0."""
        return float(self.rewards.abs().max()) or 1.0

    def returns(self, gamma: float = 1.0) -> list[float]:
        """(Discounted) returns of the whole episodes; an unfinished one at the end does not count."""
        if not self.ordered:
            return []
        starts = self.starts()
        to_go = self.rewards.double() if gamma == 0 else self._to_go(gamma)
        return to_go[starts[: int(self.ends.sum())]].tolist()

    def starts(self) -> Tensor:
        """(E,) the row of each episode's first step, an unfinished one's included. Every row if rows have no order."""
        if not self.ordered:
            return torch.arange(len(self))
        return torch.cat([torch.zeros(1, dtype=torch.long), self.ends[:-1].nonzero()[:, 0] + 1])

    def returns_to_go(self, gamma: float) -> Tensor:
        """(N,) r_t + γ r_{t+1} + … up to the end of the episode or of the data."""
        if not self.ordered:
            raise UserError(f"{self.name}: its rows are in no order, so that returns from a step on are unknown")
        return self._to_go(gamma).float()

    def _to_go(self, gamma: float) -> Tensor:
        return returns_to_go(self.rewards.double()[:, None], self.ends[:, None], gamma)[:, 0]

    def split(self, share: float, rng: torch.Generator) -> tuple[Dataset, Dataset | None]:
        """(the rest, about `share` of the episodes), drawn at random; (all, None) if there is only one episode."""
        starts = self.starts()
        if len(starts) < 2:
            return self, None
        count = min(max(round(share * len(starts)), 1), len(starts) - 1)
        drawn = torch.zeros(len(starts), dtype=torch.bool)
        drawn[torch.randperm(len(starts), generator=rng)[:count]] = True
        lengths = torch.diff(starts, append=torch.tensor([len(self)]))
        rows = drawn.repeat_interleave(lengths)
        return self._rows(~rows), self._rows(rows)

    def _rows(self, rows: Tensor) -> Dataset:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {name: x[rows] for name, x in values.items() if isinstance(x, Tensor)}
        return Dataset(**values)

    def save(self, path: Path) -> None:
        arrays = {name: getattr(self, name).numpy() for name in COLUMNS}
        if self.shape:
            for name in ("observations", "next_observations"):
                arrays[name] = arrays[name].reshape(-1, *self.shape)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def fit(self, env: environments.Env) -> Dataset:
        """The same steps as the environment's: discrete actions counted from 0, whatever number the environment gives
        its first action, several discrete parts as one number, states one-hot. UserError if shapes or actions do not
        match the environment, or if actions are continuous and observations images."""
        name, space = env.name, env.action_space
        if env.continuous:
            features = "make features of them, (N, D), and an environment of these"
            environments.refuse_images(env, "offline RL of continuous actions", features)
        if env.continuous and not self.continuous and getattr(space.dtype, "kind", "") in "iu":
            return replace(self, actions=self.actions.view(len(self), -1).float()).fit(env)
        if self.continuous != env.continuous:
            kinds = {True: "continuous", False: "discrete"}
            raise UserError(
                f"{self.name}: actions are {kinds[self.continuous]}, those of {name} {kinds[env.continuous]}"
            )
        data, dim = self, self.observations.shape[1]
        if dim != env.obs_dim and bool((self.observations == self.observations.round()).all()):
            if env.classes and dim == 1:
                data = self.one_hot(env.classes, env.first, name)
            elif type(env.observation_space).__name__ == "MultiDiscrete" and dim == env.observation_space.nvec.size:
                data = self._coded(env)
        if (dim := data.observations.shape[1]) != env.obs_dim:
            raise UserError(f"{self.name}: observations have {dim} numbers, {name}'s {env.obs_dim}")
        self._check_pixels(env)
        if not env.continuous:
            if self.actions.ndim == 2:
                counts, first = _parts(space)
                return data._combined(counts, first, f"{name} has")
            return data._counted(env.action_dim, env.start, f"{name} has")
        if (dim := self.actions.shape[1]) != env.action_dim:
            raise UserError(f"{self.name}: actions have {dim} numbers, {name}'s {env.action_dim}")
        low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in (env.actions.low, env.actions.high))
        if bool(((self.actions < low) | (self.actions > high)).any()):
            raise UserError(f"{self.name}: actions beyond {low.tolist()} … {high.tolist()}, the bounds of {name}")
        return data

    def _check_pixels(self, env: environments.Env) -> None:
        """UserError unless observations have the axes and the type of the environment's images, if these are any."""
        pixels, image = self.observations.dtype == torch.uint8, env.observed
        if not isinstance(image, Image):
            if pixels:
                raise UserError(f"{self.name}: observations are {self.image}, those of {env.name} are vectors")
            return
        if (shape := self.shape or self.observations.shape[1:]) != image.shape:
            raise UserError(f"{self.name}: observations have the axes {tuple(shape)}, {env.name}'s {image.shape}")
        if pixels != (env.dtype == np.uint8):
            kinds = {True: "pixels of uint8", False: "numbers other than uint8"}
            raise UserError(
                f"{self.name}: observations are {kinds[pixels]}, those of {env.name} {kinds[not pixels]}: write them "
                "as the environment gives them"
            )

    def _coded(self, env: environments.Env) -> Dataset:
        """Numbers of a MultiDiscrete space as the environment's one-hot vectors."""
        shape = env.observation_space.nvec.shape
        coded: dict[str, Any] = {
            name: torch.from_numpy(
                np.stack([env.vector(row.reshape(shape)) for row in getattr(self, name).long().numpy()])
            )
            for name in ("observations", "next_observations")
        }
        return replace(self, **coded, shape=())

    def _combined(self, counts: list[int], first: list[int], has: str) -> Dataset:
        """Several discrete parts of an action as one number in mixed radix, the last part fastest."""
        if len(counts) != self.actions.shape[1]:
            raise UserError(f"{self.name}: actions have {self.actions.shape[1]} parts, {has} {len(counts)}")
        combined = torch.zeros(len(self), dtype=torch.long)
        for i, (count, least) in enumerate(zip(counts, first, strict=True)):
            part = self.actions[:, i] - least
            if bool((wrong := (part < 0) | (part >= count)).any()):
                row = int(wrong.int().argmax())
                allowed = f"{has} {least} … {least + count - 1}"
                raise UserError(f"{self.name}: actions[{row}, {i}] is {int(self.actions[row, i])}, {allowed}")
            combined = combined * count + part
        return replace(self, actions=combined)

    def _counted(self, count: int, first: int, has: str) -> Dataset:
        actions = self.actions - first
        if bool((wrong := (actions < 0) | (actions >= count)).any()):
            row = int(wrong.int().argmax())
            raise UserError(
                f"{self.name}: actions[{row}] is {int(self.actions[row])}, {has} {first} … {first + count - 1}"
            )
        return replace(self, actions=actions)

    def one_hot(self, count: int, first: int, owner: str) -> Dataset:
        """Numbers of states as one-hot rows (N, count). UserError if one is not among first … first + count − 1."""
        found: dict[str, Any] = {}
        if 2 * len(self) * count > npz.NUMBERS:
            raise UserError(
                f"{self.name}: {len(self):,} steps of {count:,} one-hot states are more numbers than are kept"
            )
        for column in ("observations", "next_observations"):
            numbers = getattr(self, column)[:, 0].long() - first
            if bool((wrong := (numbers < 0) | (numbers >= count)).any()):
                row = int(wrong.int().argmax())
                states = f"{owner} has {first} … {first + count - 1}"
                raise UserError(f"{self.name}: {column}[{row}] is state {int(numbers[row]) + first}, {states}")
            found[column] = torch.nn.functional.one_hot(numbers, count).float()
        return replace(self, **found, states=False)

    def alone(self, states: int = 0, low: str = "", high: str = "") -> tuple[Dataset, Spaces]:
        """The same steps and the spaces that they show, for learning without the environment.

        states: number of states of integer observations; 0: the largest in the data and those below it. low, high:
        bounds of continuous actions, a number or one for each component, separated by commas; none: the range of the
        logged actions and 1 % of it on both sides. UserError if they do not fit the data.
        """
        data, said = self, ""
        if self.states:
            largest = int(torch.maximum(self.observations, self.next_observations).max())
            count, first = self.state_space or (states or largest + 1, 0)
            if states:
                count = states
            if not 1 <= count <= MAX_CLASSES:
                raise UserError(f"{self.name}: {count:,} states: 1 … {MAX_CLASSES:,} are taken; number them from 0")
            data = self.one_hot(count, first, "--states" if states else "the log")
            said = f"{count} one-hot states"
        elif states:
            raise UserError(f"--states is for integer observations (N,) or (N, 1): those of {self.name} are not")
        seen: int | Image = self.image or data.observations.shape[1]
        if self.image and self.continuous:
            raise UserError(
                f"{self.name}: observations are {self.image}, and offline RL of continuous actions learns from "
                "vectors: make features of them, (N, D)"
            )
        said = said or (str(seen) if self.image else f"observations of {seen} numbers")
        if not self.continuous:
            if low or high:
                raise UserError(f"--action-low and --action-high: the actions of {self.name} are discrete")
            if self.actions.ndim == 2:
                low_, high_ = self.actions.amin(0), self.actions.amax(0)
                counts, firsts = (high_ - low_ + 1).tolist(), low_.tolist()
                if (total := math.prod(counts)) > MAX_ACTIONS:
                    raise UserError(
                        f"{self.name}: integer actions of {len(counts)} parts have {total:,} combinations, "
                        f"{MAX_ACTIONS:,} are taken; floats are continuous actions"
                    )
                data = data._combined(counts, firsts, "the log has")
                said += f", {total} combinations of {len(counts)} discrete actions"
                return data, Spaces(seen, total, None, None, said)
            least, most = int(self.actions.min()), int(self.actions.max())
            count, first = self.action_space or (most - least + 1, least)
            if count > MAX_CLASSES:
                raise UserError(f"{self.name}: actions from {least} to {most}: no more than {MAX_CLASSES:,} are taken")
            data = data._counted(count, first, "the log has")
            return data, Spaces(seen, count, None, None, f"{said}, actions {first} … {first + count - 1}")
        least_, most_ = self.actions.amin(0), self.actions.amax(0)
        room = MARGIN * (most_ - least_)
        room = torch.where(room > 0, room, MARGIN * least_.abs().clamp(min=1.0))
        bounds = _bounds(low, "--action-low", least_ - room), _bounds(high, "--action-high", most_ + room)
        if bool(((self.actions < bounds[0]) | (self.actions > bounds[1])).any()):
            shown = f"{_shown(least_)} … {_shown(most_)}"
            raise UserError(f"{self.name}: --action-low and --action-high exclude logged actions: they are {shown}")
        if bool((bounds[0] >= bounds[1]).any()):
            raise UserError("--action-low must be below --action-high")
        how = "" if low and high else f" (the logged range and {MARGIN:.0%} of it; --action-low, --action-high)"
        return data, Spaces(
            seen, len(least_), *bounds, f"{said}, actions {_shown(bounds[0])} … {_shown(bounds[1])}{how}"
        )


@dataclass
class Spaces:
    """What a learner has to know of an environment. observed: length of an observation, or the image that it is;
    action_dim: length of a continuous action, or the number of discrete ones; low, high (A,): bounds of continuous
    actions, else None."""

    observed: int | Image
    action_dim: int
    low: Tensor | None
    high: Tensor | None
    said: str = ""  # the spaces in words

    @classmethod
    def of(cls, env: environments.Env) -> Spaces:
        """UserError if continuous actions have no bounds."""
        return cls(env.observed, env.action_dim, *(environments.action_bounds(env) if env.continuous else (None, None)))

    @property
    def obs_dim(self) -> int:
        """Length of an observation's vector; methods for continuous actions learn from no images."""
        return self.observed.size if isinstance(self.observed, Image) else self.observed

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high


def _parts(space: Any) -> tuple[list[int], list[int]]:
    """(numbers, first numbers) of the parts of a MultiDiscrete or MultiBinary space; one of a Discrete one."""
    if hasattr(space, "nvec"):
        return space.nvec.ravel().tolist(), np.broadcast_to(
            getattr(space, "start", 0), space.nvec.shape
        ).ravel().tolist()
    if hasattr(space, "shape") and type(space).__name__ == "MultiBinary":
        return [2] * math.prod(space.shape), [0] * math.prod(space.shape)
    return [int(getattr(space, "n", 1))], [int(getattr(space, "start", 0))]


def _bounds(text: str, option: str, otherwise: Tensor) -> Tensor:
    if not text:
        return otherwise
    try:
        numbers = torch.tensor([float(part) for part in text.split(",")])
    except ValueError:
        raise UserError(f"{option} '{text}' is not a number, or numbers separated by commas") from None
    if len(numbers) not in (1, len(otherwise)) or not bool(numbers.isfinite().all()):
        raise UserError(f"{option} '{text}': one finite number, or {len(otherwise)}, one for each of an action's")
    return numbers.expand(len(otherwise)).clone()


def _shown(numbers: Tensor) -> str:
    texts = [f"{x:.3g}" for x in numbers.tolist()]
    return texts[0] if len(set(texts)) == 1 else f"({', '.join(texts[:6])}{', …' if len(texts) > 6 else ''})"


# --- From a file


def load(path: Path, form: str = "auto", report: Callable[[str], None] = lambda text: None) -> Dataset:
    """The dataset of a file of any of `offline_files.FORMATS` (`form` forces one). UserError names the field and the
    first row that is wrong. `report` is called with a line that says what was read."""
    offline_files.check_format(form)
    path = Path(path)
    log, found = offline_files.read(path, form)
    try:
        data = _dataset(log, _name(path))
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    returns = data.returns()
    what = f"{len(returns):,} whole episodes, mean return {fmean(returns):.4g}" if returns else "no whole episode"
    notes = list(log.notes)
    if unknown := len(data) - len(data.usable):
        notes.append(f"the observation after {unknown:,} of them is not known: these are not learned from")
    report(f"{path.name}: format {found}, {len(data):,} steps, {what}{''.join(f'; {note}' for note in notes)}")
    return data


def _name(path: Path) -> str:
    """The file's name without its suffix; of a Minari dataset that of its folder."""
    if path.stem == "main_data" and path.suffix == ".hdf5":
        path = path.parent
        path = path.parent if path.name == "data" else path
        return path.resolve().name
    return path.resolve().name if path.is_dir() else path.stem


def _dataset(log: Log, name: str) -> Dataset:
    """The columns of a file, checked, as tensors."""
    states, known = columns.check(log)
    dtypes: dict[str, Any] = {"terminations": bool, "truncations": bool}
    if log.columns["observations"].dtype == np.uint8 and Image.of_shape(log.shape):
        dtypes |= {"observations": np.uint8, "next_observations": np.uint8}
    dtypes["actions"] = np.int64 if log.columns["actions"].dtype.kind in "iu" else np.float32
    tensors: dict[str, Any] = {
        field: torch.from_numpy(array.astype(dtypes.get(field, np.float32))) for field, array in log.columns.items()
    }
    return Dataset(
        **tensors, name=name, known=None if known is None else torch.from_numpy(known), ordered=log.ordered,
        states=states, state_space=log.states, action_space=log.actions, shape=log.shape,
    )  # fmt: skip


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
    return _dataset(Log(dict(zip(names, columns, strict=True)), lambda column, row: f"{column}[{row}]"), quality)
