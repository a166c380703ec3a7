"""Learning from a log alone: no environment to try a policy in, so fitted Q evaluation (FQE) judges it, on episodes
that it did not learn from.

FQE is itself an estimate. Its control is the behavior policy, the log's own: what that one earns is known, so FQE of
it, which uses the logged next action, shows how far FQE is off. Values are discounted, of the starts of the held-out
episodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.errors import UserError
from finetune.rl.envs.logged_data import Dataset
from finetune.rl.envs.replay import Transitions
from finetune.rl.statistics import mean_and_error
from finetune.runs.display import uncertain
from finetune.runs.run import Run

BEHAVIOR = "behavior"


@dataclass
class HeldOut:
    """Episodes to evaluate a policy on. Rewards are scaled as in learning, `returns` are not."""

    steps: Transitions
    starts: Tensor  # (E, D) first observations, bytes of images
    returns: list[float]  # discounted returns (E,) of the behavior policy; empty if no episode is whole
    reward_size: float  # the largest absolute reward, not scaled
    # the steps after which the behavior policy's next action is known, or needless; none if rows are in no order
    followed: Transitions
    next_policy: Tensor  # its action there: one-hot (M, A) if discrete, else (M, A)
    first_policy: Tensor  # its first actions (E, A)

    @classmethod
    def of(cls, data: Dataset, actions: int, gamma: float, reward_scale: float) -> HeldOut:
        """data: with scaled rewards; actions: number of discrete ones."""
        ends, whole = data.ends, int(data.ends.sum()) if data.ordered else 0
        starts = data.starts()[: whole or None]
        goes_on = ~ends
        goes_on[-1] = False
        followed = (data.terminations | goes_on) & torch.tensor(data.ordered)
        if data.known is not None:
            followed &= data.known
        rows = followed.nonzero()[:, 0]

        def policy(taken: Tensor) -> Tensor:
            return data.actions[taken] if data.continuous else F.one_hot(data.actions[taken], actions).float()

        steps = Transitions(data.observations, data.actions, data.rewards, data.next_observations, data.terminations)
        return cls(
            data.transitions(), data.observations[starts], [g / reward_scale for g in data.returns(gamma)],
            data.reward_size / reward_scale,
            steps[rows], policy(rows + goes_on[rows].long()), policy(starts),
        )  # fmt: skip


def split(
    run: Run, data: Dataset, share: float, actions: int, gamma: float, reward_scale: float
) -> tuple[Dataset, HeldOut]:
    """(episodes to learn from, about `share` of them to judge by), drawn at random. data: with scaled rewards."""
    rest, held = data.split(share, run.generator("held out"))
    if held is None:
        run.print(f"{data.name}: it holds one episode: policies are judged by the steps that they learned from")
        held = data
    elif not (len(rest.usable) and len(held.usable)):
        raise UserError(f"{data.name}: too few steps to learn from some and judge by others: {len(data)}")
    return rest, HeldOut.of(held, actions, gamma, reward_scale)


def check_settings(alone: bool, settings: dict[str, object], fqe_steps: int) -> None:
    """UserError for settings of learning from a log alone that are given without it, and for it without FQE."""
    for option, value in settings.items():
        if value and not alone:
            raise UserError(f"{option} is for learning from a log alone, without its environment: see --help")
    if alone and not fqe_steps:
        raise UserError("--fqe-steps 0: without an environment, fitted Q evaluation is the only judge")


def report(
    run: Run,
    title: str,
    key: Callable[[str], str],
    method: str,
    held: HeldOut,
    values: dict[str, Tensor],
    believed: dict[str, float],
) -> None:
    """Shows and records FQE's values of the policies, next to what the behavior policy earned.

    values: of each learner and of BEHAVIOR, of the starts (E,). key: the name of a learner's figure. method: the
    learner that the run is about. Its value is a result without a target: FQE is an estimate.
    """
    observed = mean_and_error([held.returns]) if held.returns else None
    rows = []
    for name, each in values.items():
        value, error = mean_and_error([each.tolist()])
        rows.append({
            "policy": name, "FQE": uncertain(value, error),
            "believed": f"{believed[name]:.4g}" if name in believed else "–",
            "observed": uncertain(*observed) if name == BEHAVIOR and observed else "–",
        })  # fmt: skip
        if name == method:
            run.result(key(name), value, error=error, baseline=observed[0] if observed else None)
        else:
            run.check(key(name), value, error=error)
    run.table(f"{title}: discounted values of {len(held.starts)} held-out starts (± over the starts alone)", rows)
    if BEHAVIOR not in values:
        return
    gain, error = mean_and_error([(values[method] - values[BEHAVIOR]).tolist()])
    run.check(key(f"{method}_over_{BEHAVIOR}"), gain, error=error)
    run.print(f"{method} is worth {uncertain(gain, error)} more than the log's own policy, by FQE of both")
    if observed is None:
        return
    off, error = mean_and_error([(values[BEHAVIOR] - torch.tensor(held.returns)).tolist()])
    run.check(key(f"error_{BEHAVIOR}"), off, error=error)
    if abs(off) > max(3 * error, 0.1 * abs(observed[0]), 0.01 * held.reward_size):
        run.print(
            f"FQE is off by {uncertain(off, error)} for the log's own policy, whose return is known: read its other "
            "values with an error of that size, or give it more --fqe-steps"
        )
