"""Gymnasium environments with float32 vector observations, discrete actions from 0 on, and checked inputs and outputs.

`Env` is the boundary: a policy's output becomes an action of the environment's own space and type, and observations and
rewards become float32. A step that breaks gymnasium's contract raises UserError with a one-line reason.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.errors import UserError, nearest
from finetune.rl.envs.rollout import Rollout

Act = Callable[[Tensor], Tensor]  # a policy: observations (N, D) → actions (N,) or (N, A); called without gradients
MAX_REWARD = float(np.finfo(np.float32).max)
MAX_SIZE = 100_000  # of an observation or action; a Discrete observation becomes a one-hot vector
MAX_TIME_LIMIT = 1_000_000  # steps: a longer time limit counts as none


class EpisodeLimit:
    """The time limit for environments that have none, whose episodes might never end. Reaching it is a truncation; the
    first time `report` is called with a message, and `summary` puts it into the run's metrics."""

    def __init__(self, limit: int = 1000, report: Callable[[str], None] = lambda text: None) -> None:
        self.limit, self.report, self.reached = limit, report, False

    def note(self, name: str) -> None:
        if not self.reached:
            self.report(
                f"'{name}' has no time limit and an episode had not ended after {self.limit} steps: it is cut off "
                "there, as by a time limit (--max-episode-steps)"
            )
        self.reached = True

    def summary(self) -> dict[str, float]:
        return {"episodes_cut_off_at": float(self.limit)} if self.reached else {}

    def state_dict(self) -> dict[str, bool]:
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        self.reached |= state["reached"]


class Env:
    """One environment. `obs_dim`: length of an observation; `action_dim`: length of a continuous action, or the number
    of discrete ones; `limit`: steps after which an episode is truncated, the environment's `own` limit or that of
    `episode_limit`."""

    def __init__(self, env: Any, name: str, limit: int | None, episode_limit: EpisodeLimit) -> None:
        from gymnasium.spaces import Box, Discrete

        self.env, self.name, self.episode_limit, self.age = env, name, episode_limit, 0
        self.own = limit is not None and limit <= MAX_TIME_LIMIT
        self.limit: int = limit if limit is not None and self.own else episode_limit.limit
        for what in ("observation_space", "action_space"):
            space: Any = getattr(env, what, None)
            if space is None:
                raise UserError(f"'{name}' has no {what}: gymnasium requires one")
            fits = isinstance(space, Discrete) or (isinstance(space, Box) and len(space.shape) == 1)
            if not fits:
                raise UserError(
                    f"'{name}' has {what.split('_')[0]}s of {space}: a Box of one axis or a Discrete space is needed "
                    "(gymnasium.wrappers.FlattenObservation makes one axis of an image or a Dict)"
                )
            size = int(space.n) if isinstance(space, Discrete) else space.shape[0]
            if not 1 <= size <= MAX_SIZE:
                raise UserError(f"'{name}' has {what.split('_')[0]}s of {size:,} numbers: 1 … {MAX_SIZE:,} are taken")
        space = self.observation_space = env.observation_space
        self.classes = int(space.n) if isinstance(space, Discrete) else 0  # states of a Discrete observation space
        self.first = int(space.start) if self.classes else 0
        self.obs_dim = self.classes or int(space.shape[0])
        space = self.action_space = env.action_space
        self.continuous = isinstance(space, Box)
        self.action_dim = int(space.shape[0] if isinstance(space, Box) else space.n)
        self.kind = space.dtype.type if space.dtype is not None else np.int64

    @property
    def spec(self) -> Any:
        return self.env.spec

    @property
    def unwrapped(self) -> Any:
        return self.env.unwrapped

    @property
    def start(self) -> int:
        """The environment's own number of the first discrete action."""
        return 0 if self.continuous else int(self.action_space.start)

    def to_env(self, action: Any) -> Any:
        """The environment's action for a discrete one counted from 0, or for a continuous vector: of the space's own
        type, clipped to the bounds of a Box, rounded where the Box is of integers."""
        if not self.continuous:
            return self.kind(self.start + action)
        inside = np.minimum(np.maximum(action, self.action_space.low), self.action_space.high)
        if issubclass(self.kind, np.integer):
            inside = np.rint(inside)
        return inside.astype(self.kind)

    def reset(self, *, seed: int) -> tuple[NDArray[np.float32], dict[str, Any]]:
        try:
            found = self.env.reset(seed=seed)
        except Exception as e:
            raise self._raised("reset", e) from e
        if not (isinstance(found, (tuple, list)) and len(found) == 2 and isinstance(found[1], dict)):
            raise self._broken(f"returned {_shown(found)} from reset", "the first observation and a dict, info")
        self.age = 0
        return self.vector(found[0]), found[1]

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """action: a discrete one counted from 0, or a continuous vector (A,)."""
        try:
            found = self.env.step(self.to_env(action))
        except Exception as e:
            raise self._raised("step", e) from e
        if not (isinstance(found, (tuple, list)) and len(found) == 5):
            raise self._broken(f"returned {_shown(found)} from step", FIVE)
        observation, reward, terminated, truncated, info = found
        if not (isinstance(reward, (float, int, np.floating, np.integer)) and -MAX_REWARD <= reward <= MAX_REWARD):
            reward = self._reward(reward)
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, (bool, np.bool_)):
                raise self._broken(f"gave {_shown(flag)} for {name}", f"True or False ({FIVE})")
        if not isinstance(info, dict):
            raise self._broken(f"gave {_shown(info)} for info", f"a dict ({FIVE})")
        self.age += 1
        if self.age >= self.limit:
            if not (self.own or terminated or truncated):
                self.episode_limit.note(self.name)
            truncated = True
        return self.vector(observation), float(reward), bool(terminated), bool(truncated), info

    def vector(self, observation: Any) -> NDArray[np.float32]:
        """An observation as a float32 copy; a state of a Discrete space as a one-hot vector."""
        if self.classes:
            return self._one_hot(observation)
        shape = self.observation_space.shape
        found = observation
        if not isinstance(found, np.ndarray):
            try:
                found = np.array(observation)
            except (ValueError, TypeError):  # rows of different lengths
                found = np.array(None)
        if found.shape != shape or found.dtype.kind not in "biuf":
            raise self._broken(
                f"gave the observation {_shown(observation)}", f"numbers of shape {shape}, as its observation_space has"
            )
        if found.dtype == np.float32:
            vector = found.copy()
        else:
            with np.errstate(over="ignore"):
                vector = found.astype(np.float32)
        if not np.isfinite(vector).all():
            i = int(np.isfinite(vector).argmin())
            raise self._broken(f"gave an observation with {found[i]} at [{i}]", "finite numbers that float32 can hold")
        return vector

    def _one_hot(self, observation: Any) -> NDArray[np.float32]:
        plain = np.asarray(observation)
        if plain.shape != () or plain.dtype.kind not in "iub" or not 0 <= int(plain) - self.first < self.classes:
            states = f"{self.first} … {self.first + self.classes - 1}"
            raise self._broken(f"gave the observation {_shown(observation)}", f"one integer of its space, {states}")
        vector = np.zeros(self.classes, np.float32)
        vector[int(plain) - self.first] = 1
        return vector

    def _reward(self, reward: Any) -> float:
        """The number of a 0-d array or tensor; UserError for anything else."""
        if getattr(reward, "shape", None) == () and not isinstance(reward, np.generic):
            reward = reward.item()
        if isinstance(reward, (float, int)) and -MAX_REWARD <= reward <= MAX_REWARD:
            return float(reward)
        raise self._broken(f"gave the reward {_shown(reward)}", "one finite number, such as float(reward)")

    def _broken(self, what: str, expected: str) -> UserError:
        return UserError(f"'{self.name}' {what}: gymnasium requires {expected}")

    def _raised(self, where: str, e: Exception) -> UserError:
        return UserError(f"'{self.name}' raised {_exception(e)} in its {where}")


FIVE = "observation, reward, terminated, truncated, info; older environments gave four, with one `done`"


def _shown(value: Any) -> str:
    """A value for an error message, on one line: its beginning and its type."""
    text = " ".join(repr(value).split())
    kind = type(value).__name__
    if isinstance(value, (tuple, list)):
        return f"{len(value)} value{'s' * (len(value) != 1)} ({text[:60]}{'…' * (len(text) > 60)})"
    if isinstance(value, np.ndarray):
        kind = f"{value.dtype} of shape {value.shape}"
    return f"{text[:60]}{'…' * (len(text) > 60)} ({kind})"


def _exception(e: Exception) -> str:
    """An exception from the user's environment on one line, with file and line."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename) != Path(__file__)]
    own = [f for f in frames if "site-packages" not in f.filename and "<frozen" not in f.filename] or frames
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    text = " ".join(str(e).split())
    return f"{type(e).__name__}{': ' * bool(text)}{text[:200]}{place}"


def make(name: str, count: int, limit: int | None = None, episode_limit: EpisodeLimit | None = None) -> list[Env]:
    """`count` environments of this id. limit: a time limit that replaces their own; episode_limit: the one for
    environments without any. UserError if the id is unknown or its spaces are neither a vector nor discrete."""
    made = [make_unlimited(name) for _ in range(count)]
    from gymnasium import registry

    spec = made[0].spec
    own = limit if limit is not None else getattr(registry.get(spec.id) if spec else None, "max_episode_steps", None)
    episode_limit = episode_limit or EpisodeLimit()
    return [Env(env, spec.id if spec else name, own, episode_limit) for env in made]


def make_unlimited(name: str, **kwargs: Any) -> Any:
    """`gymnasium.make` without the TimeLimit wrapper; UserError says why an environment cannot be made."""
    import gymnasium

    try:  # -1: without TimeLimit
        return gymnasium.make(name, max_episode_steps=-1, disable_env_checker=True, **kwargs)
    except gymnasium.error.Error as e:
        if name.split(":")[-1] in gymnasium.registry:  # but not what it needs
            raise UserError(f"'{name}' cannot be made: {str(e).splitlines()[0]}") from None
        hint = nearest(name.split(":")[-1], gymnasium.registry)
        raise UserError(f"gymnasium has no environment '{name}'{hint or f': {e}'}") from None
    except ModuleNotFoundError as e:
        module, colon, _ = name.partition(":")
        missing = getattr(e.__cause__, "name", None) or e.name or "?"  # gymnasium raises another one from it
        if colon and (module == missing or module.startswith(f"{missing}.")):
            raise UserError(f"'{name}': Python finds no module '{missing}' (current folder, PYTHONPATH)") from None
        cause = e.__cause__ if isinstance(e.__cause__, Exception) else e
        raise UserError(f"'{name}' cannot be made: {_exception(cause)}") from None
    except Exception as e:
        raise UserError(f"'{name}' cannot be made: {_exception(e)}") from e


def sizes(env: Env) -> tuple[int, int, bool]:
    """(observation length, action length or number of discrete actions, whether actions are continuous)."""
    return env.obs_dim, env.action_dim, env.continuous


def action_bounds(env: Env) -> tuple[Tensor, Tensor]:
    """Lowest and highest action (A,) fp32. UserError if actions are not a vector, or if one has no bound."""
    if not sizes(env)[2]:
        raise UserError(f"'{env.name}' has actions of {env.action_space}: a method for continuous ones needs a vector")
    low, high = (torch.tensor(x, dtype=torch.float32) for x in (env.action_space.low, env.action_space.high))
    if not (low.isfinite() & high.isfinite() & (low < high)).all():
        raise UserError(f"'{env.name}' has actions without bounds ({env.action_space}): tanh needs both")
    return low, high


def env_actions(env: Env, actions: Tensor) -> Any:
    """A policy's actions (N,) or (N, A) as `Env.step` accepts them, one for each environment. UserError if one is not
    finite: the fault is the policy's, not the environment's."""
    if not env.continuous:
        return actions.tolist()
    if not actions.isfinite().all():
        bad = actions[~actions.isfinite()][0].item()
        fix = "try a smaller learning rate or another --seed"
        raise UserError(f"the policy's action for '{env.name}' became {bad}: {fix}")
    return actions.numpy().copy()


def play(envs: Sequence[Env], act: Act, seeds: Sequence[int]) -> Rollout:
    """One whole episode of each environment, reset with its seed. Shorter episodes are padded with rewards of 0 after
    their end: `first_episode` tells which steps count."""
    obs = np.stack([e.reset(seed=int(s) % 2**31)[0] for e, s in zip(envs, seeds, strict=True)])
    running = list(range(len(envs)))
    rows: list[tuple[Any, ...]] = []
    while running:
        observations = torch.from_numpy(obs.copy())
        with torch.inference_mode():
            actions = act(observations)
        steps = env_actions(envs[0], actions)
        rewards = np.zeros(len(envs), np.float32)
        terminated, truncated = (np.zeros(len(envs), bool) for _ in range(2))
        for i in running:
            obs[i], rewards[i], terminated[i], truncated[i], _ = envs[i].step(steps[i])
        running = [i for i in running if not (terminated[i] or truncated[i])]
        rows.append((observations, actions, *map(torch.from_numpy, (rewards, obs.copy(), terminated, truncated))))
    return Rollout(*(torch.stack(column) for column in zip(*rows, strict=True)))
