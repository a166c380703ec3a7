"""Gymnasium environments: made and checked, and whole episodes of them. Everything drawn depends on the seeds given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.errors import UserError, nearest
from finetune.rl.rollout import Rollout

Act = Callable[[Tensor], Tensor]  # observations (N, D) → actions (N,) or (N, A); called without gradients


def make(name: str, count: int, limit: int | None = None) -> list[Any]:
    """`count` environments of this id, unchecked at each step; limit: the time limit, where it is not to be their own.
    UserError if there is none, or if its spaces are no vectors (Box, Discrete observations; Box, Discrete actions)."""
    import gymnasium

    try:
        made = [gymnasium.make(name, max_episode_steps=limit, disable_env_checker=True) for _ in range(count)]
    except gymnasium.error.Error as e:
        if name in gymnasium.registry:  # but not what it needs
            raise UserError(f"'{name}' cannot be made: {str(e).splitlines()[0]}") from None
        hint = nearest(name, gymnasium.registry)
        raise UserError(f"gymnasium has no environment '{name}'{hint or f': {e}'}") from None
    for what, space in (("observations", made[0].observation_space), ("actions", made[0].action_space)):
        flat = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1
        if not (flat or isinstance(space, gymnasium.spaces.Discrete)):
            raise UserError(f"'{name}' has {what} of {space}: a vector or a number is needed")
    return made


def sizes(env: Any) -> tuple[int, int, bool]:
    """(numbers of an observation, numbers of an action or how many there are, whether actions are continuous)."""
    seen, taken = env.observation_space, env.action_space
    discrete = hasattr(taken, "n")
    return int(getattr(seen, "n", 0)) or seen.shape[0], int(taken.n) if discrete else taken.shape[0], not discrete


def vector(env: Any, observation: Any) -> np.ndarray:
    """An observation as float32; a state of a Discrete space as one of its unit vectors."""
    n = getattr(env.observation_space, "n", 0)
    return np.eye(n, dtype=np.float32)[observation] if n else np.asarray(observation, np.float32)


def play(envs: Sequence[Any], act: Act, seeds: Sequence[int]) -> Rollout:
    """One whole episode of each environment, reset with its seed. Shorter ones are padded with rewards 0 behind their
    end: `first_episode` tells which steps count. Continuous actions are clipped to what the environment takes."""
    space = envs[0].action_space
    seen = np.stack([vector(e, e.reset(seed=int(s) % 2**31)[0]) for e, s in zip(envs, seeds, strict=True)])
    running = list(range(len(envs)))
    rows: list[tuple[Any, ...]] = []
    while running:
        observations = torch.from_numpy(seen.copy())
        with torch.inference_mode():
            actions = act(observations)
        given = actions.tolist() if hasattr(space, "n") else np.clip(actions.numpy(), space.low, space.high)
        rewards = np.zeros(len(envs), np.float32)
        terminated, truncated = (np.zeros(len(envs), bool) for _ in range(2))
        for i in running:
            observation, reward, terminated[i], truncated[i], _ = envs[i].step(given[i])
            if not math.isfinite(reward):
                raise UserError(f"'{envs[i].spec.id}' gave the reward {reward}")
            rewards[i], seen[i] = reward, vector(envs[i], observation)
        running = [i for i in running if not (terminated[i] or truncated[i])]
        rows.append((observations, actions, *map(torch.from_numpy, (rewards, seen.copy(), terminated, truncated))))
    return Rollout(*(torch.stack(column) for column in zip(*rows, strict=True)))
