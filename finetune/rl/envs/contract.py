"""Gymnasium's contract of an environment: what breaks it, named before anything is trained.

`check` plays random actions in an environment and lists every breach at once. What a single reset or step returned is
checked by `reset_faults` and `step_faults`, which a running environment uses too.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from finetune.rl.envs import spaces
from finetune.rl.envs.spaces import Fault, Observations, Unsupported, shown
from finetune.runs.own_code import exception

FIVE = "observation, reward, terminated, truncated, info; older environments gave four, with one `done`"
MAX_REWARD = float(np.finfo(np.float32).max)
STEPS, SECONDS = 200, 5.0  # of random actions, at most
REPEATED = 20  # steps that are played twice, to see whether a seed repeats an episode

Faults = dict[str, str]  # what was returned → what is wrong with it


def reset_faults(seen: Observations, found: Any) -> Faults:
    """What is wrong with what `reset` returned."""
    if not (isinstance(found, (tuple, list)) and len(found) == 2 and isinstance(found[1], dict)):
        return {"reset": _requires(f"returned {shown(found)} from reset", "the first observation and a dict, info")}
    return observation_faults(seen, found[0])


def step_faults(seen: Observations, found: Any) -> Faults:
    """What is wrong with what `step` returned."""
    faults: Faults = {}
    if not (isinstance(found, (tuple, list)) and len(found) == 5):
        faults["step"] = _requires(f"returned {shown(found)} from step", FIVE)
        if not (isinstance(found, (tuple, list)) and len(found) == 4):
            return faults
        found = (*found[:3], False, found[3])
    observation, reward, terminated, truncated, info = found
    try:
        number(reward)
    except ValueError:
        faults["reward"] = _requires(f"gave the reward {shown(reward)}", "one finite number, such as float(reward)")
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, (bool, np.bool_)):
            faults[name] = _requires(f"gave {shown(flag)} for {name}", f"True or False ({FIVE})")
    if not isinstance(info, dict):
        faults["info"] = _requires(f"gave {shown(info)} for info", f"a dict ({FIVE})")
    return faults | observation_faults(seen, observation)


def observation_faults(seen: Observations, observation: Any) -> Faults:
    try:
        seen.vector(observation)
    except Fault as e:
        return {"observation": _requires(e.what, e.required)}
    return {}


def number(reward: Any) -> float:
    """A reward as a float: a number, or a 0-d array or tensor. ValueError for anything else."""
    if getattr(reward, "shape", None) == () and not isinstance(reward, np.generic):
        reward = reward.item()
    if isinstance(reward, (float, int, np.floating, np.integer)) and -MAX_REWARD <= reward <= MAX_REWARD:
        return float(reward)
    raise ValueError(reward)


def _requires(what: str, required: str) -> str:
    return f"{what}: gymnasium requires {required}"


# --- The check


def check(env: Any) -> tuple[list[str], list[str]]:
    """(breaches, warnings) of a fresh environment, which is reset, stepped and reset again. A breach comes once."""
    play = _Play(env)
    play.spaces()
    if play.seen is not None and not play.faults:
        play.twice()
    return list(play.faults.values()), list(play.warnings.values())


class _Play:
    def __init__(self, env: Any) -> None:
        self.env, self.faults, self.warnings = env, Faults(), Faults()
        self.seen: Observations | None = None

    def spaces(self) -> None:
        """Both spaces: whether they exist and are taken."""
        for what, read in (("observation", spaces.observations), ("action", spaces.actions)):
            try:
                found: Any = read(space_of(self.env, what))
                self.seen = found if what == "observation" else self.seen
            except Unsupported as e:
                self.faults[f"{what} space"] = str(e)

    def twice(self) -> None:
        """Random episodes, and the first steps again."""
        deadline = time.perf_counter() + SECONDS
        self.env.action_space.seed(0)
        actions = [self.env.action_space.sample() for _ in range(STEPS)]
        first = self.episodes(actions, deadline)
        if self.faults:
            return
        again = self.episodes(actions[: min(REPEATED, len(first) - 1)], math.inf)
        if any(not np.array_equal(a, b) for a, b in zip(first, again, strict=False)):
            self.warnings["seed"] = (
                "does not repeat an episode from its seed: runs on it cannot be resumed exactly, and states cannot be "
                "played again (draw from self.np_random, after super().reset(seed=seed))"
            )

    def episodes(self, actions: list[Any], deadline: float) -> list[Any]:
        """What a reset and these actions gave, episode after episode."""
        rows: list[Any] = []
        seed, over = 0, True
        for action in (None, *actions):
            if over and not self.reset(seed, rows):
                return rows
            seed, over = seed + over, False
            if action is None:
                continue
            try:
                found = self.env.step(action)
            except Exception as e:
                self.faults["step"] = f"raised {exception(e)} in its step"
                return rows
            assert self.seen is not None
            self.add(step_faults(self.seen, found))
            if "step" in self.faults or "terminated" in self.faults or "truncated" in self.faults:
                return rows
            if not self.faults:
                rows.append(np.append(self.seen.vector(found[0]), [number(found[1]), found[2], found[3]]))
            self.bounds(found[0])
            over = bool(found[2] or found[3])
            if time.perf_counter() > deadline:
                break
        if over:
            self.reset(seed, rows)
        return rows

    def reset(self, seed: int, rows: list[Any]) -> bool:
        try:
            found = self.env.reset(seed=seed)
        except Exception as e:
            self.faults["reset"] = f"raised {exception(e)} in its reset" + (" after an episode" if seed else "")
            return False
        assert self.seen is not None
        self.add(reset_faults(self.seen, found))
        if "reset" in self.faults:
            return False
        if not self.faults:
            rows.append(self.seen.vector(found[0]))
        self.bounds(found[0])
        return True

    def add(self, faults: Faults) -> None:
        for key, text in faults.items():
            self.faults.setdefault(key, text)

    def bounds(self, observation: Any) -> None:
        if "observation" not in self.faults:
            faults, warnings = _outside(self.env.observation_space, observation, "")
            self.add({"bounds": faults} if faults else {})
            if warnings:
                self.warnings.setdefault("dtype", warnings)


def space_of(env: Any, what: str) -> Any:
    """The observation or action space of an environment. Unsupported if it has none."""
    space = getattr(env, f"{what}_space", None)
    if space is None:
        raise Unsupported(f"has no {what}_space: gymnasium requires one")
    return space


def _outside(space: Any, observation: Any, where: str) -> tuple[str, str]:
    """(how an observation is outside the bounds of its boxes, how its dtype differs from theirs); empty if not."""
    kind = type(space).__name__
    if kind in ("Dict", "Tuple"):
        keys = space.spaces if kind == "Dict" else range(len(space.spaces))
        found = [_outside(space[key], observation[key], f"{where}[{key!r}]") for key in keys]
        return next((f for f, _ in found if f), ""), next((w for _, w in found if w), "")
    if not hasattr(space, "low") or not hasattr(space, "high"):
        return "", ""
    array = np.asarray(observation)
    warning = ""
    if isinstance(observation, np.ndarray) and not np.can_cast(array.dtype, space.dtype):
        warning = f"gives {array.dtype} observations{where} for a space of {space.dtype}: they are converted"
    slack = 1e-4 * np.maximum(1.0, abs(array.astype(np.float64)))  # rounding
    wrong = (array < space.low - slack) | (array > space.high + slack)
    if not wrong.any():
        return "", warning
    at = tuple(map(int, np.argwhere(wrong)[0]))
    bounds = f"{space.low[at]:g} … {space.high[at]:g}"
    return _requires(
        f"gave an observation with {array[at]:g} at {where}{list(at)}, outside of its space",
        f"{bounds} there: widen observation_space, or scale the observation",
    ), warning
