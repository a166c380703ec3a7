"""A vector environment: several environments stepped together, each reset at the end of its episode, resumable.

A gymnasium episode is a function of its reset seed and its actions, so a checkpoint holds these and resuming replays
the current episodes. Nothing is pickled. UserError if an environment does not repeat an episode from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.errors import UserError
from finetune.rl.envs.environments import Act, Env, env_actions
from finetune.rl.envs.rollout import Rollout


class VectorEnv:
    """`envs` of one kind (from `environments.make`), stepped together.

    Episode k of environment i is reset with a seed that depends on (seed, i, k) only.
    """

    def __init__(self, envs: Sequence[Env], seed: int) -> None:
        self.envs, self.seed = list(envs), seed
        self.episodes = [0] * len(envs)  # how many each has begun
        self.taken: list[list[Any]] = [[] for _ in envs]  # actions of the current episode
        self.earned = np.zeros(len(envs))  # sum of its rewards, float64
        self.finished: list[tuple[float, int]] = []  # (undiscounted return, length) of episodes, until `pop_finished`
        self.observations: NDArray[Any] = np.stack([self._reset(i) for i in range(len(envs))])  # (N, D)

    def __len__(self) -> int:
        return len(self.envs)

    def step(self, actions: Tensor) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]:
        """actions (N,) or (N, A) → rewards (N,) fp32, next observations (N, D), terminated, truncated (N,) bool.

        At the end of an episode the next observation is its last one; `observations` holds the first of the next.
        """
        found = []
        for env, taken, action in zip(self.envs, self.taken, env_actions(self.envs[0], actions), strict=True):
            found.append(env.step(action))
            taken.append(action)
        seen, earned, over, cut, _ = zip(*found, strict=True)
        next_obs, rewards = np.array(seen), np.array(earned, np.float32)
        self.earned += rewards
        self.observations = next_obs
        if any(over) or any(cut):
            self.observations = next_obs.copy()
            for i in range(len(self.envs)):
                if over[i] or cut[i]:
                    self.finished.append((float(self.earned[i]), len(self.taken[i])))
                    self.observations[i] = self._reset(i)
        return rewards, next_obs, np.array(over), np.array([b and not a for a, b in zip(over, cut, strict=True)])

    def collect(self, act: Act, steps: int) -> Rollout:
        """A rollout of `steps` steps of each environment, from where the last one stopped."""
        obs = np.empty((steps, *self.observations.shape), self.observations.dtype)
        next_obs, rewards = np.empty_like(obs), np.empty(obs.shape[:2], np.float32)
        terminated, truncated = (np.empty(obs.shape[:2], bool) for _ in range(2))
        actions = []
        with torch.inference_mode():  # torch.stack below makes ordinary tensors again
            for t in range(steps):
                obs[t] = self.observations
                actions.append(act(torch.from_numpy(obs[t])))
                rewards[t], next_obs[t], terminated[t], truncated[t] = self.step(actions[t])
        after = map(torch.from_numpy, (rewards, next_obs, terminated, truncated))
        return Rollout(torch.from_numpy(obs), torch.stack(actions), *after)

    def pop_finished(self) -> list[tuple[float, int]]:
        """(return, length) of the episodes that ended since the last call."""
        found, self.finished = self.finished, []
        return found

    def state_dict(self) -> dict[str, Any]:
        kind = torch.float32 if self.envs[0].continuous else torch.int64
        return {
            "episodes": list(self.episodes),
            "taken": [torch.as_tensor(np.array(actions), dtype=kind) for actions in self.taken],
            "observations": torch.from_numpy(self.observations.copy()),
            "finished": list(self.finished),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replays the current episodes. UserError if one does not reach the observation it had reached."""
        self.finished = [tuple(x) for x in state["finished"]]
        for i, taken in enumerate(state["taken"]):
            self.episodes[i] = state["episodes"][i] - 1
            observation = self._reset(i)
            for action in env_actions(self.envs[i], taken):
                observation, reward, _, _, _ = self.envs[i].step(action)
                self.taken[i].append(action)
                self.earned[i] += np.float32(reward)
            self.observations[i] = observation
        if not np.array_equal(self.observations, state["observations"].numpy()):
            name = self.envs[0].name
            raise UserError(f"'{name}' does not repeat an episode from its seed: a run on it cannot be resumed")

    def _reset(self, i: int) -> NDArray[Any]:
        # SeedSequence mixes the three; two episodes share a seed with probability 2⁻³¹.
        key = np.random.SeedSequence([self.seed, i, self.episodes[i]]).generate_state(1)[0]
        observation, _ = self.envs[i].reset(seed=int(key) >> 1)
        self.episodes[i] += 1
        self.taken[i], self.earned[i] = [], 0.0
        return observation
