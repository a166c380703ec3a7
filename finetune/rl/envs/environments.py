"""Environments as learners see them: vectors or images, actions from 0 on or vectors, checked inputs and outputs.

`Env` is the boundary: a policy's output becomes an action of the environment's own space and type, and an observation
becomes one vector (spaces.py). A step that breaks gymnasium's contract raises UserError with a one-line reason; an
environment of one's own is checked before it is used (contract.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.errors import UserError
from finetune.rl.envs import contract, creators, spaces
from finetune.rl.envs.contract import MAX_REWARD
from finetune.rl.envs.rollout import Rollout
from finetune.rl.envs.spaces import SPACES as SPACES
from finetune.rl.envs.spaces import Fault, Image, Unsupported
from finetune.runs import own_code

Act = Callable[[Tensor], Tensor]  # a policy: observations (N, D) → actions (N,) or (N, A); called without gradients
MAX_TIME_LIMIT = 1_000_000  # steps: a longer time limit counts as none


class EpisodeLimit:
    """The time limit for environments that have none, whose episodes might never end. Reaching it is a truncation; the
    first time `report` is called with a message, and `summary` puts it into the run's metrics."""

    def __init__(self, limit: int = 1000, report: Callable[[str], None] = lambda text: None) -> None:
        self.limit, self.report, self.reached = limit, report, False
        self.said: set[str] = set()

    def say(self, text: str) -> None:
        """Reports a text once."""
        if text not in self.said:
            self.said.add(text)
            self.report(text)

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
    """One environment. `obs_dim`: length of an observation's vector; `observed`: the same, or the `Image` that it is;
    `action_dim`: length of a continuous action, or the number of discrete ones; `limit`: steps after which an episode
    is truncated, the environment's `own` limit or that of `episode_limit`; `repeats`: whether a seed repeats an
    episode."""

    def __init__(
        self, env: Any, name: str, limit: int | None, episode_limit: EpisodeLimit, repeats: bool = True
    ) -> None:
        self.env, self.name, self.episode_limit, self.age, self.repeats = env, name, episode_limit, 0, repeats
        self.own = limit is not None and limit <= MAX_TIME_LIMIT
        self.limit: int = limit if limit is not None and self.own else episode_limit.limit
        found: dict[str, Any] = {}
        for what, read in (("observation", spaces.observations), ("action", spaces.actions)):
            try:
                found[what] = read(contract.space_of(env, what))
            except Unsupported as e:
                raise UserError(f"'{name}' {e}") from None
        self.seen: spaces.Observations = found["observation"]
        self.actions: spaces.Actions = found["action"]
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.observed: int | Image = self.seen.image or self.seen.size
        self.obs_dim, self.dtype = self.seen.size, self.seen.dtype
        one = type(env.observation_space).__name__ == "Discrete"
        self.classes = self.seen.states if one else 0  # states of a Discrete observation space
        self.first = int(env.observation_space.start) if one else 0
        self.continuous = self.actions.low is not None
        self.action_dim = self.actions.count if self.actions.low is None else len(self.actions.low)
        self.start = self.actions.start  # the environment's own number of the first discrete action

    @property
    def spec(self) -> Any:
        return getattr(self.env, "spec", None)

    @property
    def unwrapped(self) -> Any:
        return getattr(self.env, "unwrapped", self.env)

    def to_env(self, action: Any) -> Any:
        """The environment's action, of its own type, for a discrete one counted from 0, or for a continuous vector:
        clipped to the bounds of a Box, rounded where the Box is of integers."""
        return self.actions.to_env(action)

    def reset(self, *, seed: int) -> tuple[NDArray[Any], dict[str, Any]]:
        try:
            found = self.env.reset(seed=seed)
        except Exception as e:
            raise UserError(f"'{self.name}' raised {own_code.exception(e)} in its reset") from e
        if "reset" in (faults := contract.reset_faults(self.seen, found)):
            raise self._broken(faults)
        self.age = 0
        return self.vector(found[0]), found[1]

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """action: a discrete one counted from 0, or a continuous vector (A,)."""
        try:
            found = self.env.step(self.actions.to_env(action))
        except Exception as e:
            raise UserError(f"'{self.name}' raised {own_code.exception(e)} in its step") from e
        if not (isinstance(found, (tuple, list)) and len(found) == 5):
            raise self._broken(contract.step_faults(self.seen, found))
        observation, reward, terminated, truncated, info = found
        if not (
            isinstance(reward, (float, int, np.floating, np.integer))
            and -MAX_REWARD <= reward <= MAX_REWARD
            and isinstance(terminated, (bool, np.bool_))
            and isinstance(truncated, (bool, np.bool_))
            and isinstance(info, dict)
        ):
            if faults := contract.step_faults(self.seen, found):
                raise self._broken(faults)
            reward = contract.number(reward)
        self.age += 1
        if self.age >= self.limit:
            if not (self.own or terminated or truncated):
                self.episode_limit.note(self.name)
            truncated = True
        return self.vector(observation), float(reward), bool(terminated), bool(truncated), info

    def vector(self, observation: Any) -> NDArray[Any]:
        """An observation as a copy (D,): float32, or the bytes of an image; an element of a Discrete space one-hot."""
        try:
            return self.seen.vector(observation)
        except Fault:
            raise self._broken(contract.observation_faults(self.seen, observation)) from None

    def state(self, vector: NDArray[Any]) -> int:
        """The number of the state that an observation's vector stands for, in a finite space."""
        return self.seen.state(vector)

    def _broken(self, faults: contract.Faults) -> UserError:
        return UserError(f"'{self.name}' {next(iter(faults.values()))}")


def make(
    name: str,
    count: int,
    limit: int | None = None,
    episode_limit: EpisodeLimit | None = None,
    args: Sequence[str] = (),
    check: bool = True,
) -> list[Env]:
    """`count` environments of this name (creators.py). limit: a time limit that replaces their own; episode_limit: the
    one for environments without any; args: keyword arguments, each `key=value`. UserError if there is no such
    environment, if its spaces are not taken, or if it breaks gymnasium's contract: each breach on a line."""
    creator, keywords = creators.find(name), creators.arguments(args)
    episode_limit = episode_limit or EpisodeLimit()
    repeats = creator.of_gymnasium or not check or _checked(name, creator, keywords, episode_limit)
    made = [creators.create(name, creator, keywords) for _ in range(count)]
    spec = getattr(made[0], "spec", None)
    own = limit if limit is not None else creator.time_limit
    found = [Env(env, spec.id if spec else name, own, episode_limit, repeats) for env in made]
    if isinstance(found[0].observed, Image):
        episode_limit.say(f"'{found[0].name}': {found[0].observed}")
    return found


# Environments whose contract was checked: what makes them, and whether their seeds repeat an episode.
CHECKED: dict[tuple[Any, ...], tuple[Any, bool]] = {}


def _checked(name: str, creator: creators.Creator, keywords: dict[str, Any], limit: EpisodeLimit) -> bool:
    """Checks the contract of an environment, once in a process. Returns whether a seed repeats an episode."""
    key = (name, id(creator.called), repr(creator.own), repr(keywords))
    if key not in CHECKED:
        env = creators.create(name, creator, keywords)
        try:
            breaches, warnings = contract.check(env)
        finally:
            with contextlib.suppress(Exception):
                env.close()
        if len(breaches) == 1:
            raise UserError(f"'{name}' {breaches[0]}")
        if breaches:
            lines = "\n".join(f"  '{name}' {breach}" for breach in breaches)
            raise UserError(f"'{name}' breaks gymnasium's contract in {len(breaches)} places:\n{lines}")
        for warning in warnings:
            limit.say(f"'{name}' {warning}")
        CHECKED[key] = creator.called, not any("repeat" in warning for warning in warnings)
    return CHECKED[key][1]


def sizes(env: Env) -> tuple[int | Image, int, bool]:
    """(observation length or the image that it is, action length or number of discrete actions, whether actions are
    continuous)."""
    return env.observed, env.action_dim, env.continuous


def refuse_images(env: Env, method: str, instead: str) -> None:
    """UserError for a method whose networks have no convolutions."""
    if isinstance(env.observed, Image):
        raise UserError(f"'{env.name}' has {env.observed}, and {method} learns from vectors: {instead}")


def action_bounds(env: Env) -> tuple[Tensor, Tensor]:
    """Lowest and highest action (A,) fp32. UserError if actions are not a vector, or if one has no bound."""
    if not sizes(env)[2]:
        raise UserError(f"'{env.name}' has actions of {env.action_space}: a method for continuous ones needs a vector")
    low, high = (torch.tensor(x, dtype=torch.float32) for x in (env.actions.low, env.actions.high))
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
