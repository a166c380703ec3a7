"""Checks of the columns of logged steps: shapes, kinds, numbers. Each failure names the column and its first wrong row.

Columns of shape (N, 1) become (N,), observations of several axes one row of numbers a step (bytes stay bytes: they may
be pixels), and next_observations is derived where a file lacks it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.rl.envs.offline_files import Log

MAX_NUMBER = 1e15
MAX_CLASSES = 100_000  # states or actions


def check(log: Log) -> tuple[bool, NDArray[np.bool_] | None]:
    """Checks the columns and brings them to the shapes of a `Dataset`.

    Returns (whether observations are numbers of states, (N,) where the observation after a step is known; None:
    everywhere).
    """
    arrays = log.columns
    steps = arrays["rewards"].shape[0] if arrays["rewards"].ndim else 0
    if not steps:
        raise UserError("rewards is empty")
    for field in ("rewards", "terminations", "truncations", "actions"):
        array = arrays[field]
        if array.ndim == 2 and array.shape[1] == 1 and (field != "actions" or array.dtype.kind in "iu"):
            arrays[field] = array[:, 0]
    states = _observations(log)
    discrete = arrays["actions"].ndim == 1 or arrays["actions"].dtype.kind in "iu"
    _check_shapes(arrays, steps, discrete)
    _check_numbers(log, discrete)
    known = None if "next_observations" in arrays else _split_observations(arrays, steps)
    if arrays["observations"].shape != arrays["next_observations"].shape:
        shapes = arrays["observations"].shape, arrays["next_observations"].shape
        raise UserError(f"observations are {shapes[0]}, next_observations {shapes[1]}")
    return states, known


def _observations(log: Log) -> bool:
    """Makes observations one row of numbers a step; returns whether they are numbers of states."""
    arrays, states = log.columns, False
    seen, after = arrays["observations"], arrays.get("next_observations")
    if after is not None and max(seen.ndim, after.ndim) > 2:
        if seen.shape[1:] != after.shape[1:]:
            raise UserError(f"observations are {seen.shape}, next_observations {after.shape}")
        if np.uint8 in (seen.dtype, after.dtype) and seen.dtype != after.dtype:
            raise UserError(f"observations are {seen.dtype}, next_observations {after.dtype}: write both as uint8")
    log.shape = seen.shape[1:] if seen.ndim > 2 else ()
    for field in ("observations", "next_observations"):
        array = arrays.get(field)
        if array is None:
            continue
        if array.dtype.kind in "iu" and (array.ndim == 1 or array.shape[1:] == (1,)):
            states = field == "observations" or states
            arrays[field] = array.reshape(-1, 1)
            if len(array) and (large := np.abs(array.astype(np.float64)).max()) > 2**24:
                raise UserError(f"{field} has the state {large:.0f}: states are numbered from 0, up to {MAX_CLASSES:,}")
        elif array.ndim > 2 and array.size:
            arrays[field] = array.reshape(len(array), -1)
    return states


def _check_shapes(arrays: dict[str, NDArray[Any]], steps: int, discrete: bool) -> None:
    """Dimensions, kinds of dtypes and numbers of rows."""
    numbers, flags = ("biuf", "numbers"), ("biuf", "booleans")
    expected = {
        "observations": (2, *numbers),
        "actions": (arrays["actions"].ndim, "iu", "integers, or floats in rows (N, A)") if discrete else (2, *numbers),
        "rewards": (1, *numbers),
        "next_observations": (2, *numbers),
        "terminations": (1, *flags),
        "truncations": (1, *flags),
    }
    for field, array in arrays.items():
        dimensions, kinds, what = expected[field]
        if field == "actions" and not 1 <= array.ndim <= 2:
            raise UserError(f"actions has shape {array.shape}: (N,), (N, 1) or (N, A) is read")
        if array.ndim != dimensions:
            raise UserError(f"{field} has shape {array.shape}: it must have {dimensions} dimensions")
        if array.dtype.kind not in kinds:
            raise UserError(f"{field} is {array.dtype}: it must hold {what}")
        if len(array) != steps and not (field == "observations" and "next_observations" not in arrays):
            raise UserError(f"{field} has {len(array)} rows, rewards has {steps}")


def _check_numbers(log: Log, discrete: bool) -> None:
    """Finite numbers of a size that float32 can square, flags of 0 and 1, discrete actions that int64 can hold."""
    arrays = log.columns
    for field, array in arrays.items():
        if field == "actions" and discrete:
            continue
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                finite = np.isfinite(array.astype(np.float32))
            if not finite.all():
                row = int(np.argwhere(~finite)[0][0])
                shown = " ".join(str(array[row]).split())[:80]
                raise UserError(f"{log.place(field, row)} is {shown}: every number must be finite, in float32 too")
        if array.dtype.kind != "b" and array.dtype != np.uint8 and (large := abs(array) > MAX_NUMBER).any():
            row = int(np.argwhere(large)[0][0])
            raise UserError(
                f"{log.place(field, row)} has a number beyond ±{MAX_NUMBER:g}, whose square is infinite in float32: "
                "scale it"
            )
    for field in ("terminations", "truncations"):
        if bool((wrong := (arrays[field] != 0) & (arrays[field] != 1)).any()):
            row = int(wrong.argmax())
            raise UserError(f"{log.place(field, row)} is {arrays[field][row]}: it must be 0 or 1")
    if discrete and (large := abs(arrays["actions"].astype(np.float64)) > 2**31).any():
        row = int(np.argwhere(large)[0][0])
        raise UserError(
            f"{log.place('actions', row)} is {arrays['actions'][row]}: more actions than any environment has"
        )


def _split_observations(arrays: dict[str, NDArray[Any]], steps: int) -> NDArray[np.bool_] | None:
    """Adds next_observations: of observations with one more row an episode (Minari's), or with one a step (D4RL's).

    Returns where the observation after a step is known; None: everywhere.
    """
    over = arrays["terminations"] != 0
    ends = over | (arrays["truncations"] != 0)
    episodes = int(ends.sum()) + int(not ends[-1])
    observations = arrays["observations"]
    if len(observations) == steps + episodes:
        rows = np.arange(steps) + np.concatenate([[0], ends.cumsum()[:-1]])  # episode i is shifted by i rows
        arrays["observations"], arrays["next_observations"] = observations[rows], observations[rows + 1]
        return None
    if len(observations) != steps:
        raise UserError(
            f"observations has {len(observations)} rows: without next_observations it must have {steps}, one a step, "
            f"or {steps + episodes}, one more for each of {episodes} episodes"
        )
    goes_on = ~ends
    goes_on[-1] = False
    rows = np.arange(steps) + goes_on
    arrays["next_observations"] = observations[rows]
    if not (known := goes_on | over).any():
        raise UserError("no step has a known next observation: every episode has one step that did not terminate it")
    return None if known.all() else known
