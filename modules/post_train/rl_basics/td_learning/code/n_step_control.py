"""Control by n-step returns, many runs in lockstep: n-step SARSA, tree backup, Q(σ).

    G_t = R + γ [σ G_{t+1} + (1 − σ) (Σ_a π(a|S') Q(S', a) + π(A'|S') (G_{t+1} − Q(S', A')))]   G_{t+n} = Q(S', A')

    σ = 1    n-step SARSA: follows the sampled action; off-policy with importance ratios
    σ = 0    tree backup: takes the expectation over π at every step, follows only the branch that was taken
    between  Q(σ): a mixture of the two at every step

With n = 1 the two ends are SARSA and expected SARSA. `textbook_more.py` has each as a plain loop.

Precup et al. 2000; De Asis et al. 2018, arXiv:1703.01327.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetune.rl.tabular.mdp import MDP, Array, pick

from .control import Rows, Step, TabularEnvs, at_actions, epsilon_greedy

SIGMAS = {"tree_backup": 0.0, "q_sigma": 0.5, "n_step_sarsa": 1.0}


def act(
    q: Array, allowed: NDArray[np.bool_], epsilon: float, target_epsilon: float, rng: np.random.Generator
) -> tuple[Rows, Array]:
    """ε-greedy actions (N,), and their ratio π/b where the target policy π is `target_epsilon`-greedy."""
    behavior = epsilon_greedy(q, allowed, epsilon)
    action = pick(behavior.cumsum(1), rng.random(len(q)))
    return action, at_actions(epsilon_greedy(q, allowed, target_epsilon), action) / at_actions(behavior, action)


class QSigma:
    """`runs` independent tables of n-step Q(σ).

    Each A' of the n steps weights the update by 1 − σ + σ π/b. The target policy π is `target_epsilon`-greedy, by
    default the behavior b; with 0, one step of tree backup is Q-learning.
    """

    kinds = ("q_sigma",)

    def __init__(
        self,
        mdp: MDP,
        n: int,
        sigma: float,
        runs: int,
        alpha: float,
        epsilon: float,
        rng: np.random.Generator,
        *,
        target_epsilon: float | None = None,
        limit: int | None = None,
    ) -> None:
        self.mdp, self.n, self.sigma, self.runs, self.alpha, self.epsilon = mdp, n, sigma, runs, alpha, epsilon
        self.target_epsilon = epsilon if target_epsilon is None else target_epsilon
        self.envs, self.Q, self.rows = TabularEnvs(mdp, runs, limit=limit), np.zeros((runs, *mdp.size)), np.arange(runs)
        self.past: list[tuple[Rows, Rows, Array, Array]] = []  # the last n steps: states, actions, rewards, π/b
        self.length = np.zeros(runs, np.intp)  # how many of them belong to the running episode
        self.envs.reset(np.ones(runs, bool), rng)
        self.action, self.ratio = self._choose(rng)

    def _choose(self, rng: np.random.Generator) -> tuple[Rows, Array]:
        state = self.envs.state
        return act(self.Q[self.rows, state], self.mdp.allowed[state], self.epsilon, self.target_epsilon, rng)

    def step(self, rng: np.random.Generator) -> Step:
        """One step of every row, and the update of the pair n steps back; after an end, of all that remain."""
        state, action, sigma = self.envs.state, self.action, self.sigma
        next_state, reward, terminated, over = self.envs.step(action, rng)
        self.past = [*self.past, (state, action, reward, self.ratio)][-self.n :]
        self.length = np.minimum(self.length + 1, self.n)
        self.action, self.ratio = self._choose(rng)  # A', before the update
        value = self._backup(next_state, self.action, self.Q[self.rows, next_state, self.action])
        last = np.where(terminated, 0.0, value)
        weight = np.where(terminated, 1.0, 1 - sigma + sigma * self.ratio)
        if len(self.past) == self.n:
            self._update(self.past, last, weight * (self.length == self.n))
        if over.any():
            for left in range(min(self.n - 1, len(self.past)), 0, -1):
                self._update(self.past[-left:], last, weight * (over & (self.length >= left)))
            self.length[over] = 0
            self.envs.reset(over, rng)
            first_action, first_ratio = self._choose(rng)
            self.action = np.where(over, first_action, self.action)
            self.ratio = np.where(over, first_ratio, self.ratio)
        return state, action, reward, over

    def _backup(self, states: Rows, actions: Rows, G: Array) -> Array:
        """The value of S' for the step before, where G is the return after taking A' there."""
        q = self.Q[self.rows, states]
        policy = epsilon_greedy(q, self.mdp.allowed[states], self.target_epsilon)
        mean = (policy * q).sum(1) + at_actions(policy, actions) * (G - at_actions(q, actions))
        return self.sigma * G + (1 - self.sigma) * mean

    def _update(self, steps: list[tuple[Rows, Rows, Array, Array]], last: Array, weight: Array) -> None:
        """Moves Q of the first of these steps to its return, given the value `last` of what follows the last one."""
        G = last
        for k in reversed(range(len(steps))):
            state, action, reward, ratio = steps[k]
            G = reward + self.mdp.gamma * G
            if k:
                G, weight = self._backup(state, action, G), weight * (1 - self.sigma + self.sigma * ratio)
        self.Q[self.rows, state, action] += self.alpha * weight * (G - self.Q[self.rows, state, action])
