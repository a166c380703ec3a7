"""A small game of pixels for tests: catch what falls. And the spaces in which it can show its image."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

LAYOUTS = {"last": (8, 8, 3), "first": (3, 8, 8), "gray": (8, 8), "stack": (2, 8, 8, 1), "floats": (8, 8, 2)}


class Catch(gymnasium.Env):
    """A pixel falls from a random column of the top row; a paddle in the bottom row moves left, stays or moves right.
    A step pays 1 if the paddle is below the pixel. The best return is 5.9, that of random actions 1."""

    def __init__(self, layout="last", size=8):
        self.size, self.shape = size, tuple(size if n == 8 else n for n in LAYOUTS[layout])
        self.dtype, self.bright = (np.float32, 1.0) if layout == "floats" else (np.uint8, 255)
        self.observation_space = Box(0, self.bright, self.shape, self.dtype)
        self.action_space = Discrete(3)

    def image(self):
        seen = np.zeros((self.size, self.size), self.dtype)
        seen[self.row, self.column] = self.bright
        seen[-1, self.paddle] = self.bright
        if len(self.shape) == 2:
            return seen
        channels = [n for n in self.shape if n != self.size]
        if self.shape[0] == self.size:
            return np.repeat(seen[:, :, None], channels[0], 2)
        return np.stack([seen] * channels[0]).reshape(self.shape)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column, self.paddle = 0, int(self.np_random.integers(self.size)), self.size // 2
        return self.image(), {}

    def step(self, action):
        self.row += 1
        self.paddle = min(max(self.paddle + int(action) - 1, 0), self.size - 1)
        over = self.row == self.size - 1
        return self.image(), float(self.paddle == self.column), over, False, {}
