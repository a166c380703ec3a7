"""The algorithms of Sutton & Barto as the book prints them: one table, one step at a time, no vectorization.

Prediction learns V of a given policy from episodes: states [S_0 … S_T] and rewards [R_1 … R_T]. Control acts by itself
and learns Q. V and Q are changed in place; they are 0 in terminal states and stay so. Run them with

    python -m finetune run td_learning --experiment textbook

`textbook_more.py` has the rest of the book's loops; `prediction.py` and `control.py` do the same for many runs at once.
"""

from __future__ import annotations

import numpy as np

from finetune.rl.tabular.mdp import MDP, Array

# --- Prediction


def monte_carlo(V: Array, states: list[int], rewards: list[float], alpha: float, gamma: float, first: bool) -> None:
    """Constant-α Monte Carlo, every visit or only the first one; section 5.1 and (6.1)."""
    T, G = len(rewards), 0.0
    targets: list[float] = []
    for t in reversed(range(T)):
        G = rewards[t] + gamma * G
        targets.insert(0, G)
    for t in range(T):
        if not first or states[t] not in states[:t]:
            V[states[t]] += alpha * (targets[t] - V[states[t]])


def td0(V: Array, states: list[int], rewards: list[float], alpha: float, gamma: float) -> None:
    """Tabular TD(0), section 6.1."""
    for t, reward in enumerate(rewards):
        s, next_s = states[t], states[t + 1]
        V[s] += alpha * (reward + gamma * V[next_s] - V[s])


def n_step_td(V: Array, states: list[int], rewards: list[float], n: int, alpha: float, gamma: float) -> None:
    """n-step TD, section 7.1: at time t the state of time τ = t − n + 1 is updated."""
    T = len(rewards)
    for t in range(T + n - 1):
        tau = t - n + 1
        if tau >= 0:
            G = sum(gamma ** (i - tau - 1) * rewards[i - 1] for i in range(tau + 1, min(tau + n, T) + 1))
            if tau + n < T:
                G += gamma**n * V[states[tau + n]]
            V[states[tau]] += alpha * (G - V[states[tau]])


def td_lambda(
    V: Array, states: list[int], rewards: list[float], lam: float, alpha: float, gamma: float, trace: str
) -> None:
    """TD(λ), section 12.2, with accumulating, replacing or dutch traces."""
    e = [0.0] * len(V)
    for t, reward in enumerate(rewards):
        s, next_s = states[t], states[t + 1]
        delta = reward + gamma * V[next_s] - V[s]
        e = [gamma * lam * x for x in e]
        e[s] = {"accumulating": e[s] + 1, "replacing": 1.0, "dutch": (1 - alpha) * e[s] + 1}[trace]
        for i, x in enumerate(e):
            V[i] += alpha * delta * x


def true_online_td_lambda(
    V: Array, states: list[int], rewards: list[float], lam: float, alpha: float, gamma: float
) -> None:
    """True online TD(λ), section 12.5."""
    e, old = [0.0] * len(V), 0.0
    for t, reward in enumerate(rewards):
        s, next_s = states[t], states[t + 1]
        value, next_value = V[s], V[next_s]
        delta = reward + gamma * next_value - value
        e = [gamma * lam * x for x in e]
        e[s] += 1 - alpha * e[s]
        for i, x in enumerate(e):
            V[i] += alpha * (delta + value - old) * x
        V[s] -= alpha * (value - old)
        old = next_value


# --- Control. Each function runs one episode and returns its sum of rewards.


class World:
    """One environment over the tables of an MDP: `reset` and `step`, as in gymnasium. Every action is allowed."""

    def __init__(self, mdp: MDP, rng: np.random.Generator, limit: int = 10_000) -> None:
        self.mdp, self.rng, self.limit = mdp, rng, limit

    def reset(self) -> int:
        self.age, self.state = 0, int(self.rng.choice(len(self.mdp.start), p=self.mdp.start))
        return self.state

    def step(self, action: int) -> tuple[int, float, bool]:
        """The next state, the reward, and whether the episode is over: terminated, or truncated at the limit."""
        state, self.age = self.state, self.age + 1
        self.state = int(self.rng.choice(len(self.mdp.P), p=self.mdp.P[state, action]))
        over = bool(self.mdp.terminal[self.state]) or self.age >= self.limit
        return self.state, float(self.mdp.rewards[state, action, self.state]), over


def probabilities(q: Array, epsilon: float) -> Array:
    """The ε-greedy policy for action values q (A,), ties broken evenly."""
    greedy = q == q.max()
    return epsilon / len(q) + (1 - epsilon) * greedy / greedy.sum()


def epsilon_greedy(q: Array, epsilon: float, rng: np.random.Generator) -> int:
    return int(rng.choice(len(q), p=probabilities(q, epsilon)))


def sarsa(env: World, Q: Array, alpha: float, gamma: float, epsilon: float, rng: np.random.Generator) -> float:
    """SARSA, section 6.4."""
    total, over, s = 0.0, False, env.reset()
    a = epsilon_greedy(Q[s], epsilon, rng)
    while not over:
        next_s, reward, over = env.step(a)
        next_a = epsilon_greedy(Q[next_s], epsilon, rng)
        Q[s, a] += alpha * (reward + gamma * Q[next_s, next_a] - Q[s, a])
        s, a, total = next_s, next_a, total + reward
    return total


def expected_sarsa(env: World, Q: Array, alpha: float, gamma: float, epsilon: float, rng: np.random.Generator) -> float:
    """Expected SARSA, section 6.6."""
    total, over, s = 0.0, False, env.reset()
    while not over:
        a = epsilon_greedy(Q[s], epsilon, rng)
        next_s, reward, over = env.step(a)
        mean = probabilities(Q[next_s], epsilon) @ Q[next_s]
        Q[s, a] += alpha * (reward + gamma * mean - Q[s, a])
        s, total = next_s, total + reward
    return total


def q_learning(env: World, Q: Array, alpha: float, gamma: float, epsilon: float, rng: np.random.Generator) -> float:
    """Q-learning, section 6.5."""
    total, over, s = 0.0, False, env.reset()
    while not over:
        a = epsilon_greedy(Q[s], epsilon, rng)
        next_s, reward, over = env.step(a)
        Q[s, a] += alpha * (reward + gamma * Q[next_s].max() - Q[s, a])
        s, total = next_s, total + reward
    return total


def double_q_learning(
    env: World, Q1: Array, Q2: Array, alpha: float, gamma: float, epsilon: float, rng: np.random.Generator
) -> float:
    """Double Q-learning, section 6.7: one table chooses the greedy action, the other evaluates it."""
    total, over, s = 0.0, False, env.reset()
    while not over:
        a = epsilon_greedy(Q1[s] + Q2[s], epsilon, rng)
        next_s, reward, over = env.step(a)
        learns, evaluates = (Q1, Q2) if rng.random() < 0.5 else (Q2, Q1)
        target = reward + gamma * evaluates[next_s, learns[next_s].argmax()]
        learns[s, a] += alpha * (target - learns[s, a])
        s, total = next_s, total + reward
    return total
