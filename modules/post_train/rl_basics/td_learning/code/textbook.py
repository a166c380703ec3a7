"""The algorithms as Sutton & Barto print them: one table, one episode, plain loops.

An episode is (states [S_0 … S_T], rewards [R_1 … R_T]); S_T is terminal and V(S_T) stays 0. For control it is a list of
steps. V and Q are changed in place.
"""

from __future__ import annotations

from finetune.rl.tabular.mdp import Array


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


def lambda_return(V: Array, states: list[int], rewards: list[float], t: int, lam: float, gamma: float) -> float:
    """G^λ_t of a whole episode, equation (12.3), V being fixed."""
    T, G, running = len(rewards), 0.0, 0.0
    for n in range(1, T - t):
        running += gamma ** (n - 1) * rewards[t + n - 1]
        G += (1 - lam) * lam ** (n - 1) * (running + gamma**n * V[states[t + n]])
    return G + lam ** (T - t - 1) * sum(gamma**i * r for i, r in enumerate(rewards[t:]))


def offline_lambda_return(
    V: Array, states: list[int], rewards: list[float], lam: float, alpha: float, gamma: float
) -> None:
    """The offline λ-return algorithm, section 12.1, with all increments made from the values at the episode's start."""
    first = V.copy()
    for t, s in enumerate(states[:-1]):
        V[s] += alpha * (lambda_return(first, states, rewards, t, lam, gamma) - first[s])


def batch(
    V: Array, episodes: list[tuple[list[int], list[float]]], alpha: float, gamma: float, method: str, sweeps: int
) -> None:
    """Batch updating, section 6.3: the increments of all steps of all episodes are added up, then made."""
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
    """Incremental off-policy Monte Carlo of one state, section 5.6: C is the sum of weights, V moves by W / C."""
    V, C, path = 0.0, 0.0, []
    for G, W in zip(returns, ratios, strict=True):
        C += W
        if W:
            V += W / C * (G - V)
        path.append(V)
    return path


Step = tuple[int, int, float, int]  # state, action, reward, next state


def greedily(Q: Array, state: int, epsilon: float) -> list[float]:
    """ε-greedy probabilities, all actions being allowed."""
    q = list(Q[state])
    best = [x == max(q) for x in q]
    return [epsilon / len(q) + (1 - epsilon) * b / sum(best) for b in best]


def n_step_sarsa(Q: Array, episode: list[Step], ratios: list[float], n: int, alpha: float, gamma: float) -> None:
    """n-step SARSA, sections 7.2 and 7.3; `ratios` are π/b of the actions, 1 on-policy."""
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
    """n-step Q(σ) as a sum of TD errors (De Asis et al. 2018, equation 14); π is ε-greedy by Q."""
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
                then, pi = episode[k + 1][1], greedily(Q, after, epsilon)
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
    """SARSA(λ), or Watkins' Q(λ), with replacing traces, sections 12.7 and 12.10; `last` is the action that
    follows an episode that has not ended. Q(λ) cuts the trace if the next action is not greedy after the update."""
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
    """n-step tree backup, section 7.5; π is ε-greedy by Q. Without the end, only what n steps are known of."""
    T = len(episode)
    for t in range(T + n - 1 if ended else T):
        tau = t - n + 1
        if tau < 0:
            continue
        if t + 1 >= T and ended:
            G = episode[-1][2]
        else:
            _, _, reward, after = episode[t]
            G = reward + gamma * sum(p * q for p, q in zip(greedily(Q, after, epsilon), Q[after], strict=True))
        for k in range(min(t, T - 1), tau, -1):
            state, action, _, _ = episode[k]
            pi = greedily(Q, state, epsilon)
            others = sum(p * q for a, (p, q) in enumerate(zip(pi, Q[state], strict=True)) if a != action)
            G = episode[k - 1][2] + gamma * (others + pi[action] * G)
        state, action, _, _ = episode[tau]
        Q[state, action] += alpha * (G - Q[state, action])
