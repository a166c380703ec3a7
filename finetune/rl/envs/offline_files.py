"""Files of logged steps as others write them. Each format of `FORMATS` is recognized by the names in the file and read
to the same columns, one row a step, episode after episode, under Minari's names (`FIELDS`).

Where a file lacks the observation after a step (D4RL and d3rlpy keep one observation a step), it is the next row's
within an episode, as in D4RL's `qlearning_dataset`. After the last step of an episode that did not terminate it is
unknown: such steps count in returns and are not learned from. After a terminal step nothing is bootstrapped; its own
observation stands in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError, nearest
from finetune.rl.envs import hdf5, npz
from finetune.runs import reading

Array = NDArray[Any]

# A column and its names in files, the clearest first. `done` is true at a time limit too in older environments.
NAMES = {
    "observations": ("observations", "observation", "obs", "states"),
    "actions": ("actions", "action"),
    "rewards": ("rewards", "reward"),
    "terminations": ("terminations", "terminals", "terminated", "dones", "done"),
    "truncations": ("truncations", "truncated", "timeouts", "episode_terminals"),
    "next_observations": ("next_observations", "next_observation", "next_obs", "next_states"),
}
FIELDS = tuple(NAMES)[:5]
ALL = tuple(name for names in NAMES.values() for name in names)
MAX_EPISODES = 1_000_000
METADATA = 1 << 24  # most bytes of a Minari dataset's metadata.json


@dataclass
class Log:
    """The columns of a file before they are checked. place(column, row): what the file calls a number."""

    columns: dict[str, Array]
    place: Callable[[str, int], str]
    known: Array | None = None  # (N,) whether the observation after the step is known; None: everywhere
    ordered: bool = True  # whether the rows are in the order of the episodes
    states: tuple[int, int] | None = None  # (number, first) of Discrete observations, if the file says so
    actions: tuple[int, int] | None = None  # the same of Discrete actions
    notes: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()  # of an observation, if it has several axes; `columns.check` finds it


@dataclass
class Source:
    """An opened file: the names at its top level, and the arrays of a file of columns."""

    path: Path
    names: set[str]
    flat: Callable[[], dict[str, Array]]
    tree: hdf5.Tree | None = None


# --- Columns: this project's own, D4RL's, CORL's, d3rlpy 1's


def _columns(source: Source) -> Log:
    """A file of one array a column, by any of its names."""
    arrays, columns, keys = source.flat(), {}, {}
    for column, names in NAMES.items():
        for name in names:
            if name in arrays and column not in columns:
                columns[column], keys[column] = arrays[name], name
    log = Log(columns, lambda column, row: f"{keys.get(column, column)}[{row}]")
    missing = [name for name in FIELDS if name not in columns]
    if missing == ["truncations"] and "next_observations" in columns:
        _breaks(log)
    elif missing == ["truncations"]:
        raise UserError(
            f"it has {keys['terminations']}, but neither truncations (or timeouts) nor next_observations: nothing says "
            "where a time limit ended an episode: add truncations (N,), all 0 if there was no limit"
        )
    elif missing:
        also = ", ".join(sorted(source.names - set(keys.values())))[:80]
        needs = f"it needs {', '.join(FIELDS)}{f'; it holds {also}' if also else ''}"
        raise UserError(f"it has no {', '.join(missing)}: {needs}")
    over, cut = (_flag(columns[name]) for name in ("terminations", "truncations"))
    if keys.get("truncations") == "episode_terminals" and over.shape == cut.shape:
        columns["truncations"] = cut & ~over if _binary(log) else columns["truncations"]
    elif keys["terminations"].startswith("done") and over.shape == cut.shape and _binary(log) and (over & cut).any():
        columns["terminations"] = over & ~cut
        log.notes.append(f"{keys['terminations']} at a time limit are not read as terminations")
    return log


def _flag(array: Array) -> Array:
    return np.asarray(array != 0).reshape(-1)


def _binary(log: Log) -> bool:
    """Whether both flags hold 0 and 1 alone; if not, the check of the columns says where."""
    return all(bool(np.isin(log.columns[name], (0, 1)).all()) for name in ("terminations", "truncations"))


def _breaks(log: Log) -> None:
    """Truncations from the rows: where next_observations is not the next row's observation, a time limit cut it off."""
    before, after, over = (log.columns[name] for name in ("observations", "next_observations", "terminations"))
    if before.shape != after.shape or len(before) != len(over):  # the check of the columns says so
        log.columns["truncations"] = np.zeros(len(over), bool)
        return
    steps = len(over)
    broken = np.zeros(steps, bool)
    broken[:-1] = (after[:-1] != before[1:]).reshape(max(steps - 1, 0), -1).any(1)
    log.columns["truncations"] = cut = broken & ~_flag(over)
    log.ordered = cut.sum() <= steps / 2
    if not log.ordered:
        log.notes.append("its rows are in no order, so that the returns of its episodes are unknown")
    elif cut.any():
        log.notes.append(
            f"without truncations, an episode counts as cut off where the next row does not continue it ({cut.sum():,})"
        )


# --- d3rlpy 2: one array for each episode and column


def _d3rlpy(source: Source) -> Log:
    tree = _tree(source, "d3rlpy")
    count = len([name for name in source.names if re.fullmatch(r"rewards_\d+", name)])
    announced = next((name for name in ("num_episodes", "total_size") if name in source.names), None)
    if announced and (found := int(_scalar(tree, announced))) != count:
        raise UserError(f"{announced} is {found}, and there are {count} arrays rewards_0, rewards_1, …")
    if "observations_0_0" in source.names:
        raise UserError("its observations are tuples (observations_0_0, …): flatten them to one array an episode")
    names = {"observations": "observations", "actions": "actions", "rewards": "rewards"}
    parts: dict[str, list[Array]] = {name: [] for name in names}
    over: list[bool] = []
    for i in range(_checked(count)):
        for column, key in names.items():
            parts[column].append(tree.array(f"{key}_{i}"))
        over.append(bool(_scalar(tree, f"terminated_{i}")))
    log = _joined(parts, [f"{{}}_{i}" for i in range(count)])
    ends = np.cumsum([len(rewards) for rewards in parts["rewards"]]) - 1
    for column, flags in (("terminations", np.array(over)), ("truncations", ~np.array(over))):
        log.columns[column] = np.zeros(len(log.columns["rewards"]), bool)
        log.columns[column][ends] = flags
    return log


def _scalar(tree: hdf5.Tree, place: str) -> float:
    array = tree.array(place)
    if array.size != 1 or not np.isfinite(array).all():
        raise UserError(f"{place} has shape {array.shape}: it must be one finite number")
    return float(array.reshape(-1)[0])


# --- Minari: a group for each episode


def _minari(source: Source) -> Log:
    tree = _tree(source, "Minari")
    numbers = sorted(int(name[8:]) for name in source.names if re.fullmatch(r"episode_\d{1,9}", name))
    spaces = {what: _space(source, f"{what}_space") for what in ("observation", "action")}
    parts: dict[str, list[Array]] = {name: [] for name in (*FIELDS, "next_observations")}
    for i in numbers[: _checked(len(numbers))]:
        episode = f"episode_{i}"
        for column in ("rewards", "terminations", "truncations"):
            parts[column].append(tree.array(f"{episode}/{column}").reshape(-1))
        if tree.is_group(f"{episode}/actions"):
            raise UserError(f"{episode}/actions is a group (a Dict or Tuple): actions of one array are read")
        parts["actions"].append(tree.array(f"{episode}/actions"))
        seen, steps = _flattened(tree, f"{episode}/observations", spaces["observation"]), len(parts["rewards"][-1])
        if len(seen) != steps + 1:
            raise UserError(
                f"{episode}/observations has {len(seen)} rows, rewards has {steps}: Minari has one more than steps"
            )
        parts["observations"].append(seen[:-1])
        parts["next_observations"].append(seen[1:])
        ends = (parts["terminations"][-1] != 0) | (parts["truncations"][-1] != 0)
        if len(ends) and ends[:-1].any():
            raise UserError(f"{episode} ends at step {int(ends.argmax())}, before its last, {len(ends) - 1}")
        if len(ends) and not ends[-1]:  # the recording stopped there
            parts["truncations"][-1] = np.arange(len(ends)) == len(ends) - 1
    log = _joined(parts, [f"episode_{i}/{{}}" for i in numbers])
    log.states, log.actions = _discrete(spaces["observation"]), _discrete(spaces["action"])
    return log


def _space(source: Source, name: str) -> dict[str, Any]:
    """A space as the dataset's metadata describe it: of metadata.json next to the file, or of an attribute of the file.
    Empty if there are none."""
    path = source.path.parent / "metadata.json"
    text: Any = None
    if path.is_file():
        text = reading.json_file(path, dict[str, Any], limit=METADATA).get(name)
    elif source.tree is not None:
        text = source.tree.attribute(name)
    return reading.json_value(text.encode(), dict[str, Any], f"{path.name}: {name}") if isinstance(text, str) else {}


def _discrete(space: dict[str, Any]) -> tuple[int, int] | None:
    n, start = space.get("n"), space.get("start", 0)
    whole = space.get("type") == "Discrete" and isinstance(n, int) and isinstance(start, int)
    return (n, start) if whole and isinstance(n, int) and 1 <= n <= 100_000 else None


def _flattened(tree: hdf5.Tree, place: str, space: dict[str, Any], depth: int = 0) -> Array:
    """Observations (T + 1, …); those of a Dict or Tuple, parts in the order of their names, as one row of numbers each,
    as gymnasium's `flatten` does: a Discrete part is one-hot."""
    if not tree.is_group(place):
        return tree.array(place)
    if depth > 8:
        raise UserError(f"{place} is nested too deeply")
    names, inner, rows = tree.names(place), space.get("subspaces", {}), []
    names.sort(key=lambda name: (int(name[7:]), "") if re.fullmatch(r"_index_\d{1,9}", name) else (0, name))
    for i, name in enumerate(names):
        part = inner.get(name, {}) if isinstance(inner, dict) else inner[i] if i < len(inner) else {}
        part = part if isinstance(part, dict) else {}
        found = _flattened(tree, f"{place}/{name}", part, depth + 1)
        if part.get("type") == "MultiDiscrete":
            raise UserError(f"{place}/{name} is MultiDiscrete: not read within a Dict or Tuple")
        if found.ndim == 1 and found.dtype.kind in "iu":
            known = _discrete(part)
            if known is None:
                raise UserError(f"{place}/{name} holds integers, and no metadata.json says how many there are")
            found = _one_hot(found, *known, f"{place}/{name}")
        elif found.ndim > 2 and found.dtype == np.uint8:
            raise UserError(f"{place}/{name} has shape {found.shape}: images are not read within a Dict or Tuple")
        rows.append(found.reshape(len(found), -1) if len(found) else found.reshape(0, 0))
    if not rows:
        raise UserError(f"{place} is an empty group")
    if len({len(part) for part in rows}) > 1:
        raise UserError(f"{place}: its parts have {', '.join(str(len(part)) for part in rows)} rows")
    return np.concatenate([part.astype(np.float64) for part in rows], 1)


def _one_hot(numbers: Array, count: int, first: int, place: str) -> Array:
    if bool((wrong := (numbers < first) | (numbers >= first + count)).any()):
        row = int(wrong.argmax())
        raise UserError(f"{place}[{row}] is {numbers[row]}: its space has {first} … {first + count - 1}")
    return np.eye(count, dtype=np.float32)[numbers.astype(np.int64) - first]


# --- What files of episodes share


def _tree(source: Source, name: str) -> hdf5.Tree:
    if source.tree is None:
        raise UserError(f"it is not an HDF5 file, as those of {name} are")
    return source.tree


def _checked(count: int) -> int:
    if not 1 <= count <= MAX_EPISODES:
        raise UserError(f"it has {count:,} episodes: 1 … {MAX_EPISODES:,} are read")
    return count


def _joined(parts: dict[str, list[Array]], names: list[str]) -> Log:
    """Episodes one after the other; UserError if their shapes do not match. names: of each episode's columns, with {}
    for the column."""
    for column, arrays in parts.items():
        key = "observations" if column == "next_observations" else column
        for i, array in enumerate(arrays):
            steps, first = len(parts["rewards"][i]) if parts["rewards"][i].ndim else 0, arrays[0]
            if array.ndim == 0 or array.shape[1:] != first.shape[1:]:
                raise UserError(
                    f"{names[i].format(key)} has shape {array.shape}, that of the first episode {first.shape}"
                )
            if len(array) != steps:
                raise UserError(f"{names[i].format(key)} has {len(array)} rows, its rewards {steps}")
    starts = np.cumsum([0] + [len(rewards) for rewards in parts["rewards"]])

    def place(column: str, row: int) -> str:
        i = int(np.searchsorted(starts, row, "right")) - 1
        after = column == "next_observations"
        key = names[i].format("observations" if after else column)
        return f"{key}[{row - int(starts[i]) + after}]"

    return Log({column: np.concatenate(arrays) for column, arrays in parts.items()}, place)


# --- The formats


@dataclass(frozen=True)
class Format:
    """A file format. matches: whether these names at the top level are its own."""

    description: str
    matches: Callable[[Collection[str]], bool]
    read: Callable[[Source], Log]


def _named(*names: str, without: Iterable[str] = ()) -> Callable[[Collection[str]], bool]:
    return lambda found: any(n in found for n in names) and not any(n in found for n in without)


FORMATS = {
    "columns": Format(
        "npz or HDF5, one array a column: `observations`, `actions`, `rewards`, `terminations`, `truncations`, and "
        "`next_observations` or one more observation an episode",
        _named("truncations", "truncated"),
        _columns,
    ),
    "d4rl": Format(
        "D4RL's HDF5 (or npz): columns with `terminals` and `timeouts`; `infos/…` and `metadata/…` are ignored",
        _named("timeouts"),
        _columns,
    ),
    "corl": Format(
        "CORL's, D4RL's `qlearning_dataset`: columns with `next_observations` and `terminals`, without `timeouts`",
        lambda names: (
            _named(*NAMES["next_observations"])(names)
            and _named(*NAMES["terminations"], without=NAMES["truncations"])(names)
        ),
        _columns,
    ),
    "d3rlpy": Format(
        "d3rlpy 2's `dump`, HDF5: `observations_0`, `actions_0`, `rewards_0`, `terminated_0`, …",
        _named("rewards_0"),
        _d3rlpy,
    ),
    "d3rlpy1": Format(
        "d3rlpy 1's `MDPDataset.dump`, HDF5: columns with `terminals` and `episode_terminals`",
        _named("episode_terminals"),
        _columns,
    ),
    "minari": Format(
        "Minari's HDF5, the file or its dataset's folder: groups `episode_0`, … with one more observation than steps",
        lambda names: any(re.fullmatch(r"episode_\d+", name) for name in names),
        _minari,
    ),
}


def read(path: Path, form: str = "auto") -> tuple[Log, str]:
    """The columns of a file (or of a Minari dataset's folder), and the name of its format: `form`, or the one that its
    names show. UserError names the file and what is wrong."""
    path = _file(path)
    start = hdf5.head(path)
    if start == hdf5.SIGNATURE:
        with hdf5.opened(path) as tree:
            found = tree.names()
            return _read(Source(path, set(found), lambda: {n: tree.array(n) for n in found if n in ALL}, tree), form)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise UserError(
            f"{path} is a pickle, which can run any code when it is read: write its arrays with numpy.savez(**arrays)"
        )
    arrays, others = npz.read(path, ALL)
    try:
        return _read(Source(path, {*arrays, *others}, lambda: arrays), form)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def _read(source: Source, form: str) -> tuple[Log, str]:
    matching = [name for name, each in FORMATS.items() if each.matches(source.names)] if form == "auto" else [form]
    if len(matching) > 1:
        raise UserError(f"its names fit {' and '.join(matching)}: choose one with --data-format")
    name = matching[0] if matching else "columns"
    return FORMATS[name].read(source), name


def check_format(form: str) -> None:
    """UserError unless `form` is `auto` or one of FORMATS."""
    if form != "auto" and form not in FORMATS:
        raise UserError(f"--data-format '{form}' is not one of auto, {', '.join(FORMATS)}{nearest(form, FORMATS)}")


def _file(path: Path) -> Path:
    """The file itself; of a folder, the HDF5 file of the Minari dataset that it is."""
    if not path.is_dir():
        return path
    for inside in ("main_data.hdf5", "data/main_data.hdf5"):
        if (path / inside).is_file():
            return path / inside
    if any((path / inside).is_file() for inside in ("metadata.json", "data/metadata.json")):
        raise UserError(f"{path} is a Minari dataset without main_data.hdf5: its Arrow and Parquet storage is not read")
    raise UserError(f"{path} is a folder, not a file: of folders, only a Minari dataset is read (data/main_data.hdf5)")
