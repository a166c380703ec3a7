"""The algorithms as Sutton & Barto print them: one table, one episode, plain loops.

An episode is (states [S_0 … S_T], rewards [R_1 … R_T]); S_T is terminal and V(S_T) stays 0. V is changed in place.
"""

from __future__ import annotations

from finetune.rl.mdp import Array


def monte_carlo(V: Array, states: list[int], rewards: list[float], alpha: float, gamma: float, first: bool) -> None:
    """Constant-α Monte Carlo, every visit or the first; section 5.1 and (6.1)."""
    T, G = len(rewards), 0.0
    targets = []
    for t in reversed(range(T)):
        G = rewards[t] + gamma * G
        targets.insert(0, G)
    for t in range(T):
        if not first or states[t] not in states[:t]:
            V[states[t]] += alpha * (targets[t] - V[states[t]])


def td0(V: Array, states: list[int], rewards: list[float], alpha: float, gamma: float) -> None:
    """Tabular TD(0), section 6.1."""
    for t, reward in enumerate(rewards):
        s, after = states[t], states[t + 1]
        V[s] += alpha * (reward + gamma * V[after] - V[s])


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
        s, after = states[t], states[t + 1]
        delta = reward + gamma * V[after] - V[s]
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
        s, after = states[t], states[t + 1]
        here, there = V[s], V[after]
        delta = reward + gamma * there - here
        e = [gamma * lam * x for x in e]
        e[s] += 1 - alpha * e[s]
        for i, x in enumerate(e):
            V[i] += alpha * (delta + here - old) * x
        V[s] -= alpha * (here - old)
        old = there


def online_lambda_return(
    V: Array, states: list[int], rewards: list[float], lam: float, alpha: float, gamma: float
) -> None:
    """The online λ-return algorithm, section 12.4: at each horizon h all updates so far are made anew, from the values
    at the episode's start, with the λ-returns that h allows. The n-step returns of horizon h bootstrap from the values
    that were current at the time they reach."""
    T = len(rewards)
    first, current = V.copy(), [V.copy()]  # current[h]: the values at horizon h
    for h in range(1, T + 1):
        made = first.copy()
        for t in range(h):
            G, weight = 0.0, 1.0
            for n in range(1, h - t + 1):
                reach = t + n
                value = 0.0 if reach == T else current[reach - 1][states[reach]]
                part = sum(gamma**i * rewards[t + i] for i in range(n)) + gamma**n * value
                last = n == h - t
                G += (weight if last else (1 - lam) * weight) * part
                weight *= lam
            made[states[t]] += alpha * (G - made[states[t]])
        current.append(made)
    V[:] = current[-1]


def tree_backup(
    Q: Array,
    episode: list[tuple[int, int, float, int]],
    n: int,
    alpha: float,
    gamma: float,
    epsilon: float,
    ended: bool = True,
) -> None:
    """n-step tree backup, section 7.5, of steps (state, action, reward, next state); π is ε-greedy by Q, all actions
    being allowed. Q is changed in place. Without the end, only what n steps are known of."""

    def policy(state: int) -> list[float]:
        q = list(Q[state])
        best = [x == max(q) for x in q]
        return [epsilon / len(q) + (1 - epsilon) * b / sum(best) for b in best]

    T = len(episode)
    for t in range(T + n - 1 if ended else T):
        tau = t - n + 1
        if tau < 0:
            continue
        if t + 1 >= T and ended:
            G = episode[-1][2]
        else:
            _, _, reward, after = episode[t]
            G = reward + gamma * sum(p * q for p, q in zip(policy(after), Q[after], strict=True))
        for k in range(min(t, T - 1), tau, -1):
            state, action, _, _ = episode[k]
            pi = policy(state)
            others = sum(p * q for a, (p, q) in enumerate(zip(pi, Q[state], strict=True)) if a != action)
            G = episode[k - 1][2] + gamma * (others + pi[action] * G)
        state, action, _, _ = episode[tau]
        Q[state, action] += alpha * (G - Q[state, action])
