"""Environments side by side that never stop: after an end the next episode begins, and nothing of it leaks back.

A gymnasium episode is a function of the seed it was reset with and of the actions taken. So the state that is saved is
those: to go on, each environment plays its current episode again. Nothing is pickled, and it holds for any environment
that keeps its word about seeds; one that does not is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.errors import UserError
from finetune.rl.envs.environments import Act, Env, chosen
from finetune.rl.envs.rollout import Rollout


class Vector:
    """`envs` of one kind (finetune.rl.environments.make), stepped together.

    Episode k of environment i is reset with a seed that depends on (seed, i, k) only.
    """

    def __init__(self, envs: Sequence[Env], seed: int) -> None:
        self.envs, self.seed = list(envs), seed
        self.episodes = [0] * len(envs)  # begun by each
        self.taken: list[list[Any]] = [[] for _ in envs]  # actions of the episode under way
        self.earned = np.zeros(len(envs))  # its rewards, float64
        self.finished: list[tuple[float, int]] = []  # (undiscounted return, length) of episodes, until `pop_finished`
        self.observations: NDArray[np.float32] = np.stack([self._reset(i) for i in range(len(envs))])  # (N, D)

    def __len__(self) -> int:
        return len(self.envs)

    def step(self, actions: Tensor) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]:
        """actions (N,) or (N, A) → rewards (N,) fp32, next observations (N, D), terminated, truncated (N,) bool.

        The next observation of an end is the last of the old episode; `observations` then holds the first of the new.
        """
        given = chosen(self.envs[0], actions)
        rewards = np.empty(len(self.envs), np.float32)
        terminated, truncated = np.empty(len(self.envs), bool), np.empty(len(self.envs), bool)
        reached = np.empty_like(self.observations)
        for i, (env, action) in enumerate(zip(self.envs, given, strict=True)):
            reached[i], rewards[i], terminated[i], truncated[i], _ = env.step(action)
            self.taken[i].append(action)
        self.earned += rewards
        self.observations = reached
        if (ends := terminated | truncated).any():
            self.observations = reached.copy()
            for i in ends.nonzero()[0].tolist():
                self.finished.append((float(self.earned[i]), len(self.taken[i])))
                self.observations[i] = self._reset(i)
        return rewards, reached, terminated, truncated & ~terminated

    def collect(self, act: Act, steps: int) -> Rollout:
        """`steps` steps of each, on from where the last ones stopped."""
        seen = np.empty((steps, *self.observations.shape), np.float32)
        reached, rewards = np.empty_like(seen), np.empty(seen.shape[:2], np.float32)
        terminated, truncated = (np.empty(seen.shape[:2], bool) for _ in range(2))
        actions = []
        with torch.inference_mode():  # what is stacked below is a usual tensor again
            for t in range(steps):
                seen[t] = self.observations
                actions.append(act(torch.from_numpy(seen[t])))
                rewards[t], reached[t], terminated[t], truncated[t] = self.step(actions[t])
        after = map(torch.from_numpy, (rewards, reached, terminated, truncated))
        return Rollout(torch.from_numpy(seen), torch.stack(actions), *after)

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
        """Plays the episodes under way again. UserError if they do not lead to where they led before."""
        self.finished = [tuple(x) for x in state["finished"]]
        for i, taken in enumerate(state["taken"]):
            self.episodes[i] = state["episodes"][i] - 1
            observation = self._reset(i)
            for action in chosen(self.envs[i], taken):
                observation, reward, _, _, _ = self.envs[i].step(action)
                self.taken[i].append(action)
                self.earned[i] += np.float32(reward)
            self.observations[i] = observation
        if not np.array_equal(self.observations, state["observations"].numpy()):
            name = self.envs[0].name
            raise UserError(f"'{name}' does not repeat an episode from its seed: a run on it cannot be resumed")

    def _reset(self, i: int) -> NDArray[np.float32]:
        # SeedSequence mixes the three well; the seeds of two episodes collide with the odds of 31 random bits.
        key = np.random.SeedSequence([self.seed, i, self.episodes[i]]).generate_state(1)[0]
        observation, _ = self.envs[i].reset(seed=int(key) >> 1)
        self.episodes[i] += 1
        self.taken[i], self.earned[i] = [], 0.0
        return observation
