"""`--world` or `--data`: the tabular algorithms in a world of one's own, judged by exact values where they are known.

    prediction   TD(0) under the uniform policy                 against V of that policy
    control      SARSA, expected SARSA, Q-learning, double Q    against the best value, and that of random actions

A learning rate is N^−0.6, N counting the updates of that entry (Even-Dar & Mansour 2003): it fits deterministic and
random worlds in any unit of reward. Exploration falls from 1 to 0.1. A world without a table of transitions is played:
its policies are judged by the returns of fresh episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.errors import UserError
from finetune.rl.envs import creators, environments
from finetune.rl.envs.environments import Env, EpisodeLimit
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.rollout import episode_seeds, numpy_generator
from finetune.rl.envs.vector import VectorEnv
from finetune.rl.statistics import standard_error
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.rl.tabular.gymnasium_tables import NoTable
from finetune.rl.tabular.mdp import MDP, Array
from finetune.runs.display import uncertain
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from .control import KINDS, Learners, Rows, TabularEnvs, Unknown
from .figures_control import truncated_value

if TYPE_CHECKING:
    from .main import Config

POWER = 0.6  # of the learning rates
EPISODES = 20  # of an evaluation by returns
MAX_TABLE = 1 << 27  # numbers in all tables: a gigabyte


def learn(cfg: Config, run: Run) -> None:
    """Trains in the world of --world or --data, and reports."""
    limit = EpisodeLimit(cfg.world_limit, run.print)
    world = known_world(cfg, run)
    judge: KnownJudge | PlayedJudge
    if world is None:
        judge = PlayedJudge(cfg, run, limit)
        learners, prediction = judge.learners, None
    else:
        judge = KnownJudge(cfg, run, world)
        rng = numpy_generator(run, "world")
        check_size(cfg, world.size)
        learners = WorldLearners(world, KINDS, cfg.world_runs, cfg.rate, 1.0, rng, limit=cfg.world_limit)
        prediction = judge.prediction
    state = {"learners": learners, "limit": limit} | ({"prediction": prediction} if prediction else {})
    for step in run.steps(cfg.steps, state):
        rng = numpy_generator(run, "world", step)
        for i in range(cfg.world_steps):
            done = (step + i / cfg.world_steps) / cfg.steps
            learners.epsilon = max(0.1, 1 - 0.9 * done / 0.8)
            learners.step(rng)
            if prediction:
                prediction.step(rng)
        run.log(step, **judge.row(learners))
    judge.report(learners)
    if cfg.steps:
        judge.picture()


def known_world(cfg: Config, run: Run) -> MDP | None:
    """The MDP of --data or --world; None if it has no table of transitions."""
    if cfg.data:
        return tables.load(cfg.data, cfg.gamma, run.print)
    assert cfg.world
    try:
        return worlds.world(cfg.world, cfg.gamma, creators.arguments(cfg.env_arg))
    except NoTable:
        run.print(f"{cfg.world} has no table of transitions: values are estimated from episodes")
        return None


def check_size(cfg: Config, size: tuple[int, int]) -> None:
    rows = len(KINDS) * cfg.world_runs
    if 3 * rows * size[0] * size[1] > MAX_TABLE:
        raise UserError(
            f"{size[0]:,} states × {size[1]:,} actions in {rows} tables are more than fit: reduce --world-runs"
        )


# --- Learning


class WorldLearners(Learners):
    """`Learners` with a learning rate of each entry, `alpha` N^−0.6."""

    counts: Array | None = None

    def learn(self, table: Rows, state: Rows, action: Rows, error: Array) -> None:
        if self.counts is None:
            self.counts = np.zeros(self.Q.shape, np.float32)
        self.counts[table, self.rows, state, action] += 1
        rate = self.counts[table, self.rows, state, action].astype(np.float64) ** -POWER
        self.Q[table, self.rows, state, action] += self.alpha * rate * error

    def state_dict(self) -> dict[str, Any]:
        counts = np.zeros(self.Q.shape, np.float32) if self.counts is None else self.counts
        played = {"played": self.envs.state_dict()} if isinstance(self.envs, PlayedEnvs) else {}
        return {"tables": super().state_dict(), "counts": torch.from_numpy(counts.copy()), **played}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["tables"])
        self.counts = state["counts"].numpy().copy()
        if isinstance(self.envs, PlayedEnvs):
            self.envs.load_state_dict(state["played"])


class Prediction:
    """TD(0) of the uniform policy: `runs` independent tables V (runs, S)."""

    def __init__(self, mdp: MDP, runs: int, alpha: float, rng: np.random.Generator, limit: int) -> None:
        self.mdp, self.alpha, self.rows = mdp, alpha, np.arange(runs)
        self.envs = TabularEnvs(mdp, runs, None, limit)
        self.envs.reset(np.ones(runs, bool), rng)
        self.policy = tables.uniform(mdp).cumsum(1)
        self.V, self.counts = np.zeros((runs, mdp.size[0])), np.zeros((runs, mdp.size[0]))

    def step(self, rng: np.random.Generator) -> None:
        state = self.envs.state
        action = tables.pick(self.policy[state], rng.random(len(state)))
        after, reward, terminated, over = self.envs.step(action, rng)
        target = reward + self.mdp.gamma * np.where(terminated, 0.0, self.V[self.rows, after])
        self.counts[self.rows, state] += 1
        rate = self.alpha * self.counts[self.rows, state] ** -POWER
        self.V[self.rows, state] += rate * (target - self.V[self.rows, state])
        self.envs.reset(over, rng)

    def state_dict(self) -> dict[str, Any]:
        e = self.envs
        arrays = {"V": self.V, "counts": self.counts, "state": e.state, "total": e.total, "age": e.age,
                  "episode": e.episode}  # fmt: skip
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        arrays = {name: value.numpy().copy() for name, value in state.items()}
        e = self.envs
        self.V, self.counts = arrays["V"], arrays["counts"]
        e.state, e.total, e.age, e.episode = (arrays[name] for name in ("state", "total", "age", "episode"))


# --- A world whose transitions are known


@dataclass
class KnownJudge:
    """Exact values over `world_limit` steps from the start: of the learned policies, of random actions, the best."""

    cfg: Config
    run: Run
    mdp: MDP

    def __post_init__(self) -> None:
        mdp, cfg = self.mdp, self.cfg
        self.random = float(mdp.start @ tables.evaluate(mdp, tables.uniform(mdp), np.zeros(mdp.size[0]),
                                                        cfg.world_limit))  # fmt: skip
        V = np.zeros(mdp.size[0])
        for _ in range(cfg.world_limit):
            V = tables.action_values(mdp, V).max(1)
        self.best = float(mdp.start @ V)
        self.prediction: Prediction | None = None
        try:
            self.truth = tables.solve(mdp, tables.uniform(mdp))
        except UserError as e:
            self.run.print(f"no prediction: the uniform policy: {e}")
            return
        weights = tables.visits(mdp, tables.uniform(mdp))
        self.weights = weights / (weights.sum() or 1.0)
        rng = numpy_generator(self.run, "prediction")
        self.prediction = Prediction(mdp, cfg.world_runs, cfg.rate, rng, cfg.world_limit)

    def errors(self, V: Array) -> list[float]:
        """Root mean squared errors of each row of V, states weighted by how often the uniform policy is there."""
        return [float(x) for x in np.sqrt((V - self.truth) ** 2 @ self.weights)]

    def values(self, learners: WorldLearners) -> dict[str, list[float]]:
        found = [truncated_value(self.mdp, actions, self.cfg.world_limit) for actions in learners.greedy()]
        return {kind: found[part] for kind, part in learners.parts.items()}

    def row(self, learners: WorldLearners) -> dict[str, float]:
        row = {f"value_{kind}": fmean(values) for kind, values in self.values(learners).items()}
        if self.prediction:
            row["error_td_0"] = fmean(self.errors(self.prediction.V))
        return row

    def report(self, learners: WorldLearners) -> None:
        run, rows = self.run, []
        for kind, values in self.values(learners).items():
            mean, error = fmean(values), standard_error(values)
            gain = self.best - self.random
            share = "–" if gain <= 1e-9 * abs(self.best) else f"{(mean - self.random) / gain:.1%}"
            rows.append({"algorithm": kind.replace("_", " "), "value": uncertain(mean, error), "of the way": share})
            if kind == "q_learning":
                run.result(f"value_{kind}", mean, error=error, baseline=self.random)
            else:
                run.check(f"value_{kind}", mean, error=error)
        rows.append({"algorithm": "random actions", "value": f"{self.random:.6g}", "of the way": "0.0%"})
        rows.append({"algorithm": "best (exact)", "value": f"{self.best:.6g}", "of the way": "100.0%"})
        run.check("value_best", self.best)
        steps = f"{self.cfg.world_limit} steps, γ = {self.mdp.gamma:g}"
        run.table(f"{self.mdp.name}: exact value of the greedy policy from the start, {steps}", rows)
        if self.prediction:
            errors = self.errors(self.prediction.V)
            zero = self.errors(np.zeros((1, len(self.truth))))[0]
            run.result("error_td_0", fmean(errors), error=standard_error(errors), baseline=zero, higher=False)

    def picture(self) -> None:
        draw(self.run, self.mdp.name, "value", "exact value of the greedy policy", self.random, self.best)


# --- A world that can only be played


class PlayedEnvs:
    """Environments with finite observations, stepped as TabularEnvs are."""

    def __init__(self, envs: list[Env], seed: int) -> None:
        self.vector = VectorEnv(envs, seed)
        self.finished: list[tuple[int, float]] = []  # (row, return) of episodes since they were last looked at
        self.state: Rows = states(envs[0], self.vector.observations)
        self.total, self.age = np.zeros(len(envs)), np.zeros(len(envs), np.intp)
        self.episode: Rows = np.zeros(len(envs), np.intp)

    def reset(self, rows: NDArray[np.bool_], rng: np.random.Generator) -> None:
        """The environments themselves were reset at the end of their episodes."""
        if rows.any():
            self.state[rows] = states(self.vector.envs[0], self.vector.observations[rows])
            self.total[rows], self.age[rows] = 0, 0

    def step(self, action: Rows, rng: np.random.Generator) -> tuple[Rows, Array, NDArray, NDArray]:
        rewards, seen, terminated, truncated = self.vector.step(torch.from_numpy(action))
        self.total += rewards
        self.age += 1
        over = terminated | truncated
        self.finished += [(int(row), float(self.total[row])) for row in np.flatnonzero(over)]
        self.vector.pop_finished()
        self.episode += over
        self.state = states(self.vector.envs[0], seen)
        return self.state.copy(), rewards.astype(np.float64), terminated, over

    def state_dict(self) -> dict[str, Any]:
        return {"vector": self.vector.state_dict(), "finished": list(self.finished)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vector.load_state_dict(state["vector"])
        self.finished = [tuple(x) for x in state["finished"]]


def states(env: Env, observations: NDArray[Any]) -> Rows:
    """The numbers (N,) of the states that the vectors (N, D) stand for."""
    return np.array([env.state(vector) for vector in observations], np.intp)


class PlayedJudge:
    """Returns of the learned policies and of random actions, in fresh episodes."""

    def __init__(self, cfg: Config, run: Run, limit: EpisodeLimit) -> None:
        assert cfg.world
        self.cfg, self.run, rows = cfg, run, len(KINDS) * cfg.world_runs
        envs = environments.make(cfg.world, rows, episode_limit=limit, args=cfg.env_arg)
        env = envs[0]
        if not env.seen.states:
            raise UserError(
                f"'{cfg.world}' has observations of {env.observation_space}: a table needs a finite space (Discrete, "
                f"MultiDiscrete, MultiBinary or a Dict or Tuple of them); DQN learns from vectors: --env {cfg.world}"
            )
        if env.continuous:
            raise UserError(f"'{cfg.world}' has continuous actions ({env.action_space}): a table needs discrete ones")
        size = env.seen.states, env.action_dim
        check_size(cfg, size)
        self.seeds = episode_seeds(run, EPISODES, "world judged")
        self.test = environments.make(cfg.world, EPISODES, episode_limit=limit, args=cfg.env_arg)
        rng = run.generator("random")
        self.random = fmean(returns(self.test, lambda x: torch.randint(size[1], (len(x),), generator=rng), self.seeds))
        played = PlayedEnvs(envs, run.generator("world").initial_seed())
        world = Unknown(size, 0.99 if cfg.gamma is None else cfg.gamma)
        self.learners = WorldLearners(
            world, KINDS, cfg.world_runs, cfg.rate, 1.0, numpy_generator(run, "world"), envs=played
        )

    def row(self, learners: WorldLearners) -> dict[str, float]:
        """Mean returns while learning."""
        assert isinstance(learners.envs, PlayedEnvs)
        finished, learners.envs.finished = learners.envs.finished, []
        row = {}
        for kind, part in learners.parts.items():
            if earned := [total for row_, total in finished if part.start <= row_ < part.stop]:
                row[f"return_{kind}"] = fmean(earned)
        return row

    def report(self, learners: WorldLearners) -> None:
        run, greedy, rows = self.run, torch.from_numpy(learners.greedy()), []
        for kind, part in learners.parts.items():
            values = [fmean(returns(self.test, self.policy(actions), self.seeds)) for actions in greedy[part]]
            mean, error = fmean(values), standard_error(values)
            rows.append({"algorithm": kind.replace("_", " "), "return": uncertain(mean, error)})
            if kind == "q_learning":
                run.result(f"return_{kind}", mean, error=error, baseline=self.random)
            else:
                run.check(f"return_{kind}", mean, error=error)
        rows.append({"algorithm": "random actions", "return": f"{self.random:.6g}"})
        run.table(f"{self.cfg.world}: return of the greedy policy, {EPISODES} episodes of each table", rows)

    def policy(self, actions: Tensor) -> environments.Act:
        env = self.test[0]
        return lambda observations: actions[torch.from_numpy(states(env, observations.numpy()))]

    def picture(self) -> None:
        draw(self.run, str(self.cfg.world), "return", "return while learning", self.random, None)


def draw(run: Run, name: str, what: str, label: str, random: float, best: float | None) -> None:
    """world.png: a curve for each algorithm, and the error of prediction where it is known."""
    series = run.metrics.series()
    made, axes = figure(11, 4.4, 1, 2) if "error_td_0" in series else figure(6, 4.4, 1, 1)
    left = axes[0]
    for kind in KINDS:
        if (key := f"{what}_{kind}") in series:
            x, y = series[key]
            left.plot(np.array(x) + 1, y, linewidth=1.6, label=kind.replace("_", " "))
    for value, text, color in ((random, "random actions", "#a0aec0"), (best, "best", "#2f855a")):
        if value is not None:
            left.axhline(value, linestyle="--", linewidth=1.2, color=color, label=text)
    left.set_title(f"{name}: {label}", loc="left", fontsize=11)
    left.legend(fontsize=9, frameon=False)
    if "error_td_0" in series:
        x, y = series["error_td_0"]
        axes[1].plot(np.array(x) + 1, y, linewidth=1.6)
        axes[1].set_ylim(bottom=0)
        axes[1].set_title("TD(0): error of V of the uniform policy", loc="left", fontsize=11)
    for ax in axes:
        ax.set_xlabel("step")
    save(made, run.dir / "world.png")
