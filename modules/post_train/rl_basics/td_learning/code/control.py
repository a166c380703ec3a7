"""Learning to act: SARSA, expected SARSA, Q-learning, double Q-learning, SARSA(λ), Q(λ), Q(σ); many runs side by side.

Each moves Q(S,A) by α towards R + γ · (what it expects of S'):

    SARSA             Q(S', A'), A' being what is done next
    expected SARSA    Σ_a π(a|S') Q(S', a)
    Q-learning        max_a Q(S', a)
    double Q          Q₂(S', argmax_a Q₁(S', a)), the two tables in turns (van Hasselt 2010)
    n-step SARSA      R' + γ R'' + … + γⁿ⁻¹ Q of what is done after n steps
    tree backup       n steps of expected SARSA: at each step the branch that was taken is followed, the others are
                      estimated (Precup et al. 2000)
    Q(σ)              σ of the one and 1 − σ of the other

SARSA(λ) and Watkins' Q(λ) move all pairs that have been visited, by traces that decay by γλ. Behavior is ε-greedy,
ties broken evenly; in double Q by the sum of the two tables.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.rl.tabular.mdp import MDP, Array, pick

Kind = Literal["sarsa", "expected_sarsa", "q_learning", "double_q"]
KINDS: tuple[Kind, ...] = ("sarsa", "expected_sarsa", "q_learning", "double_q")


def epsilon_greedy(q: Array, allowed: NDArray[np.bool_], epsilon: float) -> Array:
    """Probabilities (N, A): ε spread over what is allowed, the rest over the best of it."""
    q = np.where(allowed, q, -np.inf)
    best = q == q.max(1, keepdims=True)
    return allowed * (epsilon / allowed.sum(1, keepdims=True)) + best * ((1 - epsilon) / best.sum(1, keepdims=True))


class Walkers:
    """N copies of a tabular world. After an end each begins anew; `noise` (S,) is the spread of the reward of leaving a
    state, `limit` the steps after which an episode is cut off."""

    def __init__(self, mdp: MDP, rows: int, noise: Array | None = None, limit: int | None = None) -> None:
        self.mdp, self.noise, self.limit = mdp, noise, limit
        order = np.argsort(-mdp.P, axis=2, kind="stable")[:, :, : int((mdp.P > 0).sum(2).max())]
        self.next, self.cumulative = order, np.take_along_axis(mdp.P, order, 2).cumsum(2)
        self.first = mdp.start.cumsum()[None]
        self.state = np.full(rows, -1)
        self.total, self.age, self.episode = np.zeros(rows), np.zeros(rows, np.intp), np.zeros(rows, np.intp)

    def begin(self, rows: NDArray[np.bool_], draw: np.random.Generator) -> None:
        """Draws a first state for these rows."""
        count = int(rows.sum())
        if count:
            self.state[rows] = pick(self.first, draw.random(count))
            self.total[rows], self.age[rows] = 0, 0

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Goes on with these rows only."""
        self.state, self.total, self.age, self.episode = (
            x[rows] for x in (self.state, self.total, self.age, self.episode)
        )

    def step(self, action: NDArray[np.intp], draw: np.random.Generator) -> tuple[NDArray, Array, NDArray, NDArray]:
        """Next states, rewards, terminated, and over: terminated or cut off. `begin` has to follow for what is over."""
        at = self.state, action
        if self.next.shape[2] == 1:
            after = self.next[(*at, 0)]
        else:
            after = self.next[(*at, pick(self.cumulative[at], draw.random(len(action))))]
        reward = self.mdp.rewards[(*at, after)]
        if self.noise is not None:
            reward = reward + self.noise[self.state] * draw.standard_normal(len(action))
        terminated = self.mdp.terminal[after]
        self.total += reward
        self.age += 1
        over = terminated if self.limit is None else terminated | (self.age >= self.limit)
        self.episode += over
        self.state = after.copy()
        return after, reward, terminated, over


class Learners:
    """One-step control, `kinds` × `runs` rows in lockstep; what it knows is in its state_dict.

    lam: with replacing traces, which Q-learning cuts at every action that is not greedy (Watkins 1989).
    """

    def __init__(
        self,
        mdp: MDP,
        kinds: tuple[Kind, ...],
        runs: int,
        alpha: float,
        epsilon: float,
        draw: np.random.Generator,
        *,
        lam: float | None = None,
        noise: Array | None = None,
        limit: int | None = None,
    ) -> None:
        if lam is not None and "double_q" in kinds:
            raise ValueError("double Q-learning has no traces here")
        rows = len(kinds) * runs
        self.mdp, self.kinds, self.runs, self.alpha, self.epsilon = mdp, kinds, runs, alpha, epsilon
        self.world = Walkers(mdp, rows, noise, limit)
        self.Q, self.lam = np.zeros((2, rows, *mdp.size)), lam
        self.E = None if lam is None else np.zeros((rows, *mdp.size))
        self.rows = np.arange(rows)
        self.of = {kind: np.repeat(np.array([k == kind for k in kinds]), runs) for kind in KINDS}
        self.world.begin(np.ones(rows, bool), draw)
        self.action = pick(self.policy(self.world.state).cumsum(1), draw.random(rows))

    def policy(self, states: NDArray[np.intp]) -> Array:
        """ε-greedy by the sum of the two tables; the second is zero except in double Q."""
        q = self.Q[0, self.rows, states]
        if "double_q" in self.kinds:
            q = q + self.Q[1, self.rows, states]
        return epsilon_greedy(q, self.mdp.allowed[states], self.epsilon)

    def step(self, draw: np.random.Generator) -> tuple[NDArray, NDArray, Array, NDArray]:
        """One step and update of every row. Returns states, actions, rewards and which episodes are over."""
        Q, rows, world, of = self.Q, self.rows, self.world, self.of
        state, action = world.state, self.action
        after, reward, terminated, over = world.step(action, draw)
        allowed = self.mdp.allowed[after]
        table = np.zeros(len(rows), np.intp)
        if "double_q" in self.kinds:
            table[of["double_q"]] = draw.integers(2, size=self.runs)
        uniforms = draw.random(len(rows))

        q = np.where(allowed, Q[table, rows, after], -np.inf)  # (N, A) of the table that learns
        expects = q.max(1)
        if "double_q" in self.kinds:
            other = Q[1 - table, rows, after]
            expects = np.where(of["double_q"], other[rows, q.argmax(1)], expects)
        if "sarsa" in self.kinds or "expected_sarsa" in self.kinds:
            probabilities = self.policy(after)
            follows = pick(probabilities.cumsum(1), uniforms)
            expects = np.where(of["sarsa"], q[rows, follows], expects)
            mean = (probabilities * np.where(allowed, q, 0.0)).sum(1)
            expects = np.where(of["expected_sarsa"], mean, expects)
        target = reward + self.mdp.gamma * np.where(terminated, 0.0, expects)
        error = target - Q[table, rows, state, action]
        if self.E is None:
            Q[table, rows, state, action] += self.alpha * error
        else:
            self.E *= self.mdp.gamma * self.lam
            self.E[rows, state, action] = 1
            Q[0] += (self.alpha * error)[:, None, None] * self.E

        world.begin(over, draw)
        chosen = pick(self.policy(world.state).cumsum(1), uniforms)
        if "sarsa" in self.kinds:  # it does what it has just learned from, unless an episode has begun
            chosen = np.where(of["sarsa"] & ~over, follows, chosen)
        self.action = chosen
        if self.E is not None:
            q = np.where(self.mdp.allowed[world.state], Q[0, rows, world.state], -np.inf)
            self.E[over | (of["q_learning"] & (q[rows, chosen] < q.max(1)))] = 0
        return state, action, reward, over

    def greedy(self) -> NDArray[np.intp]:
        """(N, S) the first of the best actions."""
        return np.where(self.mdp.allowed, self.Q.sum(0), -np.inf).argmax(2)

    def state_dict(self) -> dict[str, Any]:
        w = self.world
        arrays = {"Q": self.Q, "action": self.action, "state": w.state, "total": w.total, "age": w.age,
                  "episode": w.episode} | ({} if self.E is None else {"E": self.E})  # fmt: skip
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        arrays = {name: value.numpy().copy() for name, value in state.items()}
        w = self.world
        self.Q, self.action, self.E = arrays["Q"], arrays["action"], arrays.get("E")
        w.state, w.total, w.age, w.episode = (arrays[name] for name in ("state", "total", "age", "episode"))


def learn(learners: Learners, episodes: int, draw: np.random.Generator) -> Array:
    """Steps until every row has finished `episodes`; the sum of rewards of each, (kinds, runs, episodes)."""
    world = learners.world
    sums = np.full((len(learners.rows), episodes), np.nan)
    running = np.zeros(len(learners.rows))
    while (world.episode < episodes).any():
        _, _, reward, over = learners.step(draw)
        running += reward
        ended = np.flatnonzero(over & (world.episode <= episodes))
        sums[ended, world.episode[ended] - 1] = running[ended]
        running[over] = 0
    return sums.reshape(len(learners.kinds), learners.runs, episodes)


def act(
    q: Array, allowed: NDArray[np.bool_], epsilon: float, target: float, draw: np.random.Generator
) -> tuple[NDArray[np.intp], Array]:
    """ε-greedy actions (N,), and π/b of each: how much likelier the target-greedy policy takes it."""
    behavior = epsilon_greedy(q, allowed, epsilon)
    action = pick(behavior.cumsum(1), draw.random(len(q)))
    rows = np.arange(len(q))
    return action, epsilon_greedy(q, allowed, target)[rows, action] / behavior[rows, action]


def q_sigma(
    mdp: MDP,
    n: int,
    sigma: float,
    runs: int,
    episodes: int,
    alpha: float,
    epsilon: float,
    draw: np.random.Generator,
    *,
    target_epsilon: float | None = None,
    limit: int | None = None,
) -> tuple[Array, Array]:
    """n-step Q(σ) (De Asis et al. 2018, arXiv:1703.01327): Q (R, S, A) and the sums of rewards (R, episodes).

        G_t = R + γ [σ G_{t+1} + (1 − σ) (Σ_a π(a|S') Q(S', a) + π(A'|S') (G_{t+1} − Q(S', A')))]   G_{t+n} = Q(S', A')

    Each A' of the n steps weights the update by 1 − σ + σ π/b. σ = 1 is n-step SARSA, off-policy with the ratios of
    section 7.3; σ = 0 is tree backup; with n = 1 they are SARSA and expected SARSA. The target policy π is
    target_epsilon-greedy, by default the behavior b itself; with 0, one step of tree backup is Q-learning.
    """
    target = epsilon if target_epsilon is None else target_epsilon
    world, Q, rows = Walkers(mdp, runs, limit=limit), np.zeros((runs, *mdp.size)), np.arange(runs)
    past: list[tuple[NDArray, NDArray, Array, Array]] = []  # the last n steps: states, actions, rewards, π/b
    length = np.zeros(runs, np.intp)  # how many of them belong to the episode
    sums, running = np.full((runs, episodes), np.nan), np.zeros(runs)

    def choose() -> tuple[NDArray[np.intp], Array]:
        return act(Q[rows, world.state], mdp.allowed[world.state], epsilon, target, draw)

    def expected(states: NDArray[np.intp], actions: NDArray[np.intp], G: Array) -> Array:
        """What the step before expects of (S, A), if G is what A brings."""
        q = Q[rows, states]
        probabilities = epsilon_greedy(q, mdp.allowed[states], target)
        mean = (probabilities * q).sum(1) + probabilities[rows, actions] * (G - q[rows, actions])
        return sigma * G + (1 - sigma) * mean

    def update(steps: list[tuple[NDArray, NDArray, Array, Array]], last: Array, weight: Array) -> None:
        """Of the first of these steps, from the value `last` of what follows the last of them."""
        G = last
        for k in reversed(range(len(steps))):
            state, action, reward, ratio = steps[k]
            G = reward + mdp.gamma * G
            if k:
                G, weight = expected(state, action, G), weight * (1 - sigma + sigma * ratio)
        Q[rows, state, action] += alpha * weight * (G - Q[rows, state, action])

    world.begin(np.ones(runs, bool), draw)
    action, ratio = choose()
    while (world.episode < episodes).any():
        state = world.state
        after, reward, terminated, over = world.step(action, draw)
        past = [*past, (state, action, reward, ratio)][-n:]
        length = np.minimum(length + 1, n)
        action, ratio = choose()
        last = np.where(terminated, 0.0, expected(after, action, Q[rows, after, action]))
        weight = np.where(terminated, 1.0, 1 - sigma + sigma * ratio)
        if len(past) == n:
            update(past, last, weight * (length == n))
        if over.any():
            for left in range(min(n - 1, len(past)), 0, -1):  # the end is known, so what is left can be updated
                update(past[-left:], last, weight * (over & (length >= left)))
        running += reward
        ended = np.flatnonzero(over & (world.episode <= episodes))
        sums[ended, world.episode[ended] - 1] = running[ended]
        running[over], length[over] = 0, 0
        if over.any():
            world.begin(over, draw)
            begun, ratios = choose()
            action, ratio = np.where(over, begun, action), np.where(over, ratios, ratio)
    return Q, sums
