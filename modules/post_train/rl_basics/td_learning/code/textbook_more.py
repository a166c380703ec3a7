"""The rest of the book's loops: λ-returns, batch updating, importance sampling, n-step control, traces for control.

As in `textbook.py`: one table, plain loops, changed in place. A control episode is a list of steps that were taken.
"""

from __future__ import annotations

from finetune.rl.tabular.mdp import Array

from .textbook import probabilities


def online_lambda_return(
    V: Array, states: list[int], rewards: list[float], lam: float, alpha: float, gamma: float
) -> None:
    """The online λ-return algorithm, section 12.4. At each horizon h all updates so far are repeated, from the values
    at the start of the episode, with the λ-returns truncated at h. The n-step returns bootstrap from the values that
    were current at the time they end."""
    T = len(rewards)
    first, current = V.copy(), [V.copy()]  # current[h]: the values at horizon h
    for h in range(1, T + 1):
        updated = first.copy()
        for t in range(h):
            G, weight = 0.0, 1.0
            for n in range(1, h - t + 1):
                end = t + n
                value = 0.0 if end == T else current[end - 1][states[end]]
                part = sum(gamma**i * rewards[t + i] for i in range(n)) + gamma**n * value
                last = n == h - t
                G += (weight if last else (1 - lam) * weight) * part
                weight *= lam
            updated[states[t]] += alpha * (G - updated[states[t]])
        current.append(updated)
    V[:] = current[-1]


def lambda_return(V: Array, states: list[int], rewards: list[float], t: int, lam: float, gamma: float) -> float:
    """G^λ_t of a whole episode with V fixed, equation (12.3)."""
    T, G, running = len(rewards), 0.0, 0.0
    for n in range(1, T - t):
        running += gamma ** (n - 1) * rewards[t + n - 1]
        G += (1 - lam) * lam ** (n - 1) * (running + gamma**n * V[states[t + n]])
    return G + lam ** (T - t - 1) * sum(gamma**i * r for i, r in enumerate(rewards[t:]))


def offline_lambda_return(
    V: Array, states: list[int], rewards: list[float], lam: float, alpha: float, gamma: float
) -> None:
    """The offline λ-return algorithm, section 12.1: every increment uses the values at the start of the episode."""
    first = V.copy()
    for t, s in enumerate(states[:-1]):
        V[s] += alpha * (lambda_return(first, states, rewards, t, lam, gamma) - first[s])


def batch(
    V: Array, episodes: list[tuple[list[int], list[float]]], alpha: float, gamma: float, method: str, sweeps: int
) -> None:
    """Batch updating, section 6.3: the increments of all steps of all episodes are summed, then applied."""
    for _ in range(sweeps):
        change = 0.0 * V
        for states, rewards in episodes:
            for t, s in enumerate(states[:-1]):
                if method == "td":
                    target = rewards[t] + gamma * V[states[t + 1]]
                else:
                    target = sum(gamma**i * r for i, r in enumerate(rewards[t:]))
                change[s] += alpha * (target - V[s])
        V += change


def weighted_importance(returns: list[float], ratios: list[float]) -> list[float]:
    """Incremental off-policy Monte Carlo for one state, section 5.6. C is the sum of the weights W."""
    V, C, path = 0.0, 0.0, []
    for G, W in zip(returns, ratios, strict=True):
        C += W
        if W:
            V += W / C * (G - V)
        path.append(V)
    return path


Step = tuple[int, int, float, int]  # state, action, reward, next state


def n_step_sarsa(Q: Array, episode: list[Step], ratios: list[float], n: int, alpha: float, gamma: float) -> None:
    """n-step SARSA, sections 7.2 and 7.3. `ratios` are π/b of the actions: 1 on-policy."""
    T = len(episode)
    for t in range(T + n - 1):
        tau = t - n + 1
        if tau < 0:
            continue
        rho, G = 1.0, 0.0
        for i in range(tau + 1, min(tau + n, T - 1) + 1):
            rho *= ratios[i]
        for i in range(tau + 1, min(tau + n, T) + 1):
            G += gamma ** (i - tau - 1) * episode[i - 1][2]
        if tau + n < T:
            state, action, _, _ = episode[tau + n]
            G += gamma**n * Q[state, action]
        state, action, _, _ = episode[tau]
        Q[state, action] += alpha * rho * (G - Q[state, action])


def q_sigma(
    Q: Array,
    episode: list[Step],
    ratios: list[float],
    n: int,
    sigma: float,
    alpha: float,
    gamma: float,
    epsilon: float,
) -> None:
    """n-step Q(σ) as a sum of TD errors (De Asis et al. 2018, equation 14). π is ε-greedy in Q."""
    T = len(episode)
    for t in range(T + n - 1):
        tau = t - n + 1
        if tau < 0:
            continue
        rho, weight = 1.0, 1.0
        first, taken, _, _ = episode[tau]
        G = Q[first, taken]
        for k in range(tau, min(tau + n, T)):
            state, action, reward, after = episode[k]
            delta = reward - Q[state, action]
            if k + 1 < T:
                then, pi = episode[k + 1][1], probabilities(Q[after], epsilon)
                mean = sum(p * q for p, q in zip(pi, Q[after], strict=True))
                delta += gamma * (sigma * Q[after, then] + (1 - sigma) * mean)
                rho *= 1 - sigma + sigma * ratios[k + 1]
            G += weight * delta
            if k + 1 < T:
                weight *= gamma * ((1 - sigma) * pi[then] + sigma)
        Q[first, taken] += alpha * rho * (G - Q[first, taken])


def traces(
    Q: Array, episode: list[Step], last: int | None, lam: float, alpha: float, gamma: float, watkins: bool
) -> None:
    """SARSA(λ), or Watkins' Q(λ), with replacing traces, sections 12.7 and 12.10. `last` is the action after an episode
    that has not ended. Q(λ) cuts the traces if the next action is not greedy after the update."""
    E = 0.0 * Q
    for t, (state, action, reward, after) in enumerate(episode):
        then = episode[t + 1][1] if t + 1 < len(episode) else last
        value = 0.0
        if then is not None:
            value = max(Q[after]) if watkins else Q[after, then]
        E *= gamma * lam
        E[state, action] = 1
        Q += alpha * (reward + gamma * value - Q[state, action]) * E
        if watkins and then is not None and Q[after, then] < max(Q[after]):
            E *= 0


def tree_backup(
    Q: Array, episode: list[Step], n: int, alpha: float, gamma: float, epsilon: float, ended: bool = True
) -> None:
    """n-step tree backup, section 7.5. π is ε-greedy in Q. ended=False: updates only what n steps are known of."""
    T = len(episode)
    for t in range(T + n - 1 if ended else T):
        tau = t - n + 1
        if tau < 0:
            continue
        if t + 1 >= T and ended:
            G = episode[-1][2]
        else:
            _, _, reward, after = episode[t]
            G = reward + gamma * sum(p * q for p, q in zip(probabilities(Q[after], epsilon), Q[after], strict=True))
        for k in range(min(t, T - 1), tau, -1):
            state, action, _, _ = episode[k]
            pi = probabilities(Q[state], epsilon)
            others = sum(p * q for a, (p, q) in enumerate(zip(pi, Q[state], strict=True)) if a != action)
            G = episode[k - 1][2] + gamma * (others + pi[action] * G)
        state, action, _, _ = episode[tau]
        Q[state, action] += alpha * (G - Q[state, action])
