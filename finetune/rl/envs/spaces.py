"""Spaces of observations and actions: which are taken, and how each becomes the numbers of a network.

An observation becomes one vector, in the order and the coding of `gymnasium.spaces.flatten`: a Box in row-major order,
an element of a Discrete or MultiDiscrete space as a one-hot vector, the parts of a Dict or Tuple one after the other.
An image stays an image: its vector is accompanied by an `Image`, from which networks build convolutions.

A policy's action is a number from 0 on, or a vector of floats. Several discrete parts become one number over all their
combinations, several boxes one vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SIZE = 1_000_000  # of an observation's vector or a continuous action
MAX_ACTIONS = 10_000  # of several discrete parts together
LEAST_SIDE = 8  # pixels; a smaller image is a vector


class Unsupported(Exception):
    """A space that is not taken; its text follows the environment's name."""


class Fault(Exception):
    """What is wrong with an observation, and what gymnasium requires instead."""

    def __init__(self, what: str, required: str) -> None:
        super().__init__(what, required)
        self.what, self.required = what, required


@dataclass(frozen=True)
class Image:
    """How the flat vector of an observation is an image of `channels` × `height` × `width`."""

    shape: tuple[int, ...]  # of the environment's array
    axes: tuple[int, ...]  # its axes in the order: channels, height, width
    largest: float = 255.0  # of a pixel: networks divide by it

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def height(self) -> int:
        return self.shape[self.axes[-2]]

    @property
    def width(self) -> int:
        return self.shape[self.axes[-1]]

    @property
    def channels(self) -> int:
        return self.size // (self.height * self.width)

    def __str__(self) -> str:
        if len(self.shape) == 2:
            kind = "gray"
        elif len(self.shape) == 4:
            kind = f"{self.shape[0]} stacked frames, {self.channels // self.shape[0]} channels each"
        else:
            kind = f"{self.channels} channels, the {'first' if self.axes[0] == 0 else 'last'} axis"
        return f"images of {self.height} × {self.width} ({kind})"

    @classmethod
    def of(cls, space: Any) -> Image | None:
        """The image of a Box, or None if it is none: pixels of uint8, or of floats from 0 to one bound; two to four
        axes; at least `LEAST_SIDE` pixels a side. Of three axes the shorter of the first and the last is that of the
        channels; four are a stack of images with their channels last or first."""
        shape, pixels = space.shape, space.dtype == np.uint8
        if not 2 <= len(shape) <= 4 or not np.size(space.high) or (len(shape) != 3 and not pixels):
            return None
        largest = 255.0 if pixels else float(space.high.flat[0])
        if not (pixels or ((space.low == 0).all() and (space.high == largest).all() and 0 < largest < math.inf)):
            return None
        return cls.of_shape(shape, largest)

    @classmethod
    def of_shape(cls, shape: Sequence[int], largest: float = 255.0) -> Image | None:
        """The same of arrays of this shape, pixels from 0 to `largest`."""
        last = len(shape) - 1
        if not 1 <= last <= 3:
            return None
        if last == 1:
            axes: tuple[int, ...] = (0, 1)
        elif shape[-1] <= shape[-3]:
            axes = (*range(last - 2), last, last - 2, last - 1)
        else:
            axes = tuple(range(last + 1))
        found = cls(tuple(map(int, shape)), axes, largest)
        return found if min(found.height, found.width) >= LEAST_SIDE else None


# --- Observations


@dataclass(frozen=True)
class Observations:
    """How observations of a space become vectors of `size` numbers."""

    size: int
    vector: Callable[[Any], NDArray[Any]]  # raises Fault
    blocks: tuple[int, ...] = ()  # of a finite space: the lengths of its one-hot vectors in order; 0: one binary number
    image: Image | None = None
    dtype: Any = np.float32  # of the vectors: uint8 of an image of uint8, else float32

    @property
    def states(self) -> int:
        """How many elements a finite space has; 0: it is not finite."""
        return math.prod(block or 2 for block in self.blocks) if self.blocks else 0

    def state(self, vector: NDArray[Any]) -> int:
        """The number of an element of a finite space, from its vector: mixed radix, the last part fastest."""
        found, at = 0, 0
        for block in self.blocks:
            part = vector[at : at + (block or 1)]
            found = found * (block or 2) + int(part.argmax() if block else part[0])
            at += len(part)
        return found


def observations(space: Any) -> Observations:
    """How observations of this space become vectors. Unsupported names the space."""
    try:
        found = _kind(space).observations(space, "")
        if not 1 <= found.size <= MAX_SIZE:
            raise Unsupported(f"{found.size:,} numbers: 1 … {MAX_SIZE:,} are taken")
    except Unsupported as e:
        raise Unsupported(f"has observations of {e}") from None
    return found


def _box(space: Any, where: str) -> Observations:
    if space.dtype.kind not in "biuf":
        raise Unsupported(f"{space}: Boxes of integers or floats are taken")
    size, picture = math.prod(map(int, space.shape)), Image.of(space)
    if picture and where:  # in a Dict or Tuple: flat pixels from 0 to 1
        numbers = partial(_numbers, space.shape, np.float32, where)
        return Observations(size, lambda observation: numbers(observation) / np.float32(picture.largest))
    dtype = np.uint8 if picture and space.dtype == np.uint8 else np.float32
    return Observations(size, partial(_numbers, space.shape, dtype, where), image=picture, dtype=dtype)


def _numbers(shape: tuple[int, ...], dtype: Any, where: str, observation: Any) -> NDArray[Any]:
    """An array of a Box as a flat copy."""
    found = observation
    if not isinstance(found, np.ndarray):
        try:
            found = np.array(observation)
        except (ValueError, TypeError):  # rows of different lengths
            found = np.array(None)
    fits = found.shape == shape and found.dtype.kind in "biuf"
    if fits and dtype == np.uint8 and found.dtype != np.uint8:
        fits = found.dtype.kind != "f" and bool(((found >= 0) & (found <= 255)).all())
    if not fits:
        kind = "pixels of uint8" if dtype == np.uint8 else "numbers"
        required = f"{kind} of shape {shape}, as its observation_space has"
        raise Fault(f"gave the observation{where} {shown(observation)}", required)
    if found.dtype == dtype:
        vector = found.flatten()
    else:
        with np.errstate(over="ignore"):
            vector = found.astype(dtype).ravel()
    # The product is finite only if all are: it is the quicker question.
    if dtype != np.uint8 and not math.isfinite(vector.dot(vector)) and not np.isfinite(vector).all():
        i = int(np.isfinite(vector).argmin())
        at = list(map(int, np.unravel_index(i, shape)))
        raise Fault(f"gave an observation with {found.flat[i]} at {where}{at}", "finite numbers that float32 can hold")
    return vector


def _discrete(space: Any, where: str) -> Observations:
    n, first = int(space.n), int(space.start)

    def vector(observation: Any) -> NDArray[np.float32]:
        plain = np.asarray(observation)
        if plain.shape != () or plain.dtype.kind not in "iub" or not 0 <= int(plain) - first < n:
            raise Fault(
                f"gave the observation{where} {shown(observation)}",
                f"one integer of its space, {first} … {first + n - 1}",
            )
        found = np.zeros(n, np.float32)
        found[int(plain) - first] = 1
        return found

    return Observations(n, vector, (n,))


def _multi_discrete(space: Any, where: str) -> Observations:
    counts = tuple(int(n) for n in space.nvec.flat)
    first = np.broadcast_to(getattr(space, "start", 0), space.nvec.shape)
    offsets = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)

    def vector(observation: Any) -> NDArray[np.float32]:
        plain = np.asarray(observation)
        fits = plain.shape == space.nvec.shape and plain.dtype.kind in "iub"
        if not fits or not ((plain - first >= 0) & (plain - first < space.nvec)).all():
            raise Fault(f"gave the observation{where} {shown(observation)}", f"integers of {space}")
        found = np.zeros(sum(counts), np.float32)
        found[offsets + (plain - first).astype(np.int64).ravel()] = 1
        return found

    return Observations(sum(counts), vector, counts)


def _multi_binary(space: Any, where: str) -> Observations:
    shape = tuple(map(int, space.shape))
    size = math.prod(shape)

    def vector(observation: Any) -> NDArray[np.float32]:
        plain = np.asarray(observation)
        if plain.shape != shape or plain.dtype.kind not in "iubf" or not ((plain == 0) | (plain == 1)).all():
            raise Fault(f"gave the observation{where} {shown(observation)}", f"zeros and ones of shape {shape}")
        return plain.astype(np.float32).ravel()

    return Observations(size, vector, (0,) * size)


def _dict(space: Any, where: str) -> Observations:
    keys = list(space.spaces)
    parts = [_kind(part).observations(part, f"{where}[{key!r}]") for key, part in space.spaces.items()]

    def pieces(observation: Any) -> list[Any]:
        if not hasattr(observation, "keys") or set(observation.keys()) != set(keys):
            raise Fault(f"gave the observation{where} {shown(observation)}", f"a dict with the keys {keys}")
        return [observation[key] for key in keys]

    return _joined(parts, pieces)


def _tuple(space: Any, where: str) -> Observations:
    parts = [_kind(part).observations(part, f"{where}[{i}]") for i, part in enumerate(space.spaces)]

    def pieces(observation: Any) -> list[Any]:
        if not isinstance(observation, (tuple, list)) or len(observation) != len(parts):
            raise Fault(f"gave the observation{where} {shown(observation)}", f"a tuple of {len(parts)}")
        return list(observation)

    return _joined(parts, pieces)


def _joined(parts: list[Observations], pieces: Callable[[Any], list[Any]]) -> Observations:
    if not parts:
        raise Unsupported("an empty space: it has no numbers")
    blocks = tuple(block for part in parts for block in part.blocks) if all(part.blocks for part in parts) else ()

    def vector(observation: Any) -> NDArray[np.float32]:
        return np.concatenate([p.vector(piece) for p, piece in zip(parts, pieces(observation), strict=True)])

    return Observations(sum(p.size for p in parts), vector, blocks)


# --- Actions


@dataclass(frozen=True)
class Actions:
    """How a policy's actions become those of a space. `count` discrete ones, or vectors between `low` and `high`."""

    to_env: Callable[[Any], Any]  # a number from 0 on, or a vector of floats → the space's own action, of its own type
    count: int = 0
    low: NDArray[Any] | None = None  # (A,)
    high: NDArray[Any] | None = None
    start: int = 0  # the environment's own number of the first of one discrete action


def actions(space: Any) -> Actions:
    """How a policy's actions become those of this space. Unsupported names the space."""
    try:
        found = _kind(space).actions(space)
        size = found.count if found.low is None else len(found.low)
        if found.count > MAX_ACTIONS and type(space).__name__ != "Discrete":
            raise Unsupported(f"{space}: {found.count:,} combinations, at most {MAX_ACTIONS:,} are taken")
        if not 1 <= size <= MAX_SIZE:
            raise Unsupported(f"{size:,} numbers: 1 … {MAX_SIZE:,} are taken")
    except Unsupported as e:
        raise Unsupported(f"has actions of {e}") from None
    return found


def _box_actions(space: Any) -> Actions:
    kind, shape, integers = space.dtype.type, space.shape, space.dtype.kind in "iu"
    if space.dtype.kind not in "iuf":
        raise Unsupported(f"{space}: Boxes of integers or floats are taken")
    low, high = space.low.ravel(), space.high.ravel()

    def to_env(action: Any) -> NDArray[Any]:
        """Clipped to the bounds, rounded where the Box is of integers."""
        inside = np.minimum(np.maximum(action, low), high)
        if integers:
            inside = np.rint(inside)
        return inside.astype(kind).reshape(shape)

    return Actions(to_env, low=low, high=high)


def _discrete_actions(space: Any) -> Actions:
    kind = space.dtype.type if space.dtype is not None else np.int64
    start = int(space.start)
    return Actions(lambda action: kind(start + action), int(space.n), start=start)


def _multi_discrete_actions(space: Any) -> Actions:
    counts = tuple(int(n) for n in space.nvec.flat)
    first, shape, dtype = np.broadcast_to(getattr(space, "start", 0), space.nvec.shape), space.nvec.shape, space.dtype

    def to_env(action: Any) -> NDArray[Any]:
        return (np.array(_places(int(action), counts)).reshape(shape) + first).astype(dtype)

    return Actions(to_env, math.prod(counts))


def _multi_binary_actions(space: Any) -> Actions:
    shape, dtype = tuple(map(int, space.shape)), space.dtype
    counts = (2,) * math.prod(shape)
    return Actions(lambda action: np.array(_places(int(action), counts), dtype).reshape(shape), math.prod(counts))


def _places(number: int, counts: Sequence[int]) -> list[int]:
    """The parts of a number in mixed radix, the last part fastest."""
    found = []
    for count in reversed(counts):
        number, place = divmod(number, count)
        found.append(place)
    return found[::-1]


def _dict_actions(space: Any) -> Actions:
    keys = list(space.spaces)
    return _joined_actions(space, space.spaces.values(), lambda parts: dict(zip(keys, parts, strict=True)))


def _tuple_actions(space: Any) -> Actions:
    return _joined_actions(space, space.spaces, tuple)


def _joined_actions(space: Any, spaces: Any, build: Callable[[list[Any]], Any]) -> Actions:
    """All discrete: one number over all combinations. All boxes: one vector."""
    parts = [_kind(part).actions(part) for part in spaces]
    discrete = [part.low is None for part in parts]
    if not parts or any(discrete) != all(discrete):
        raise Unsupported(f"{space}: its parts must be all discrete or all boxes")
    if all(discrete):
        counts = [part.count for part in parts]

        def choose(action: Any) -> Any:
            places = _places(int(action), counts)
            return build([part.to_env(place) for part, place in zip(parts, places, strict=True)])

        return Actions(choose, math.prod(counts))
    lows, highs = [p.low for p in parts if p.low is not None], [p.high for p in parts if p.high is not None]
    cuts = np.cumsum([len(low) for low in lows])[:-1]

    def split(action: Any) -> Any:
        return build([part.to_env(piece) for part, piece in zip(parts, np.split(action, cuts), strict=True)])

    return Actions(split, low=np.concatenate(lows), high=np.concatenate(highs))


# --- The spaces


@dataclass(frozen=True)
class Space:
    """A kind of space. Its text says what becomes of it."""

    text: str
    observations: Callable[[Any, str], Observations]
    actions: Callable[[Any], Actions]

    def __str__(self) -> str:
        return self.text


SPACES: dict[str, Space] = {
    "Box": Space(
        "any number of axes: a vector, or an image through convolutions; as actions a bounded or unbounded vector",
        _box, _box_actions,
    ),
    "Discrete": Space("any start: a one-hot vector; as actions numbers from 0 on", _discrete, _discrete_actions),
    "MultiDiscrete": Space(
        "a one-hot vector for each number; as actions one number over all combinations",
        _multi_discrete, _multi_discrete_actions,
    ),
    "MultiBinary": Space(
        "zeros and ones; as actions one number over all combinations", _multi_binary, _multi_binary_actions
    ),
    "Dict": Space("its parts one after the other; as actions all discrete or all boxes", _dict, _dict_actions),
    "Tuple": Space("its parts one after the other; as actions all discrete or all boxes", _tuple, _tuple_actions),
}  # fmt: skip


def _kind(space: Any) -> Space:
    """The entry of SPACES for a space: of its class, or of the first of its base classes."""
    for base in type(space).__mro__:
        if base.__module__.partition(".")[0] == "gymnasium" and base.__name__ in SPACES:
            return SPACES[base.__name__]
    if type(space).__module__.partition(".")[0] == "gym":
        raise Unsupported(f"{space}, a space of the old package gym: use gymnasium.spaces")
    raise Unsupported(f"{shown(space)}: {', '.join(SPACES)} are taken")


def shown(value: Any) -> str:
    """A value for an error message, on one line: its beginning and its type."""
    text = " ".join(repr(value).split())
    kind = type(value).__name__
    if isinstance(value, (tuple, list)):
        return f"{len(value)} value{'s' * (len(value) != 1)} ({text[:60]}{'…' * (len(text) > 60)})"
    if isinstance(value, np.ndarray):
        kind = f"{value.dtype} of shape {value.shape}"
    return f"{text[:60]}{'…' * (len(text) > 60)} ({kind})"
