"""Rewards of completions: functions of texts, the project's and the user's.

    def my_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]: …

`columns` holds what the rows of the prompts have besides (an answer to compare with), a value for each completion. A
reward is named by `vader`, by `my_reward.py:my_reward`, or with a weight by `vader*0.5`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.alignment import vader, verifiers
from finetune.errors import UserError, nearest
from finetune.runs import own_code

Function = Callable[..., Sequence[float]]


def sentiment(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The sum of the ratings of a completion's words in VADER's lexicon."""
    return [vader.score(text) for text in completions]


def one_number(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1.0 where the completion is one integer and nothing else but white space, else 0.0: the form, right or wrong."""
    return [float(text.strip().removeprefix("-").isdecimal() and text.isascii()) for text in completions]


def words(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The number of words of a completion."""
    return [float(len(text.split())) for text in completions]


REWARDS: dict[str, tuple[str, Function]] = {
    "vader": ("sum of the words' sentiment in VADER's lexicon", sentiment),
    "sum": ("1 if the completion begins with the result of the prompt's sum", verifiers.right_sum),
    "format": ("1 if the completion is one integer and nothing else", one_number),
    "length": ("number of words", words),
}


@dataclass(frozen=True)
class Scale:
    """The mean and the standard deviation of the rewards of the reference's answers: with them as zero and unit, 0 is
    an answer as before and 1 a usual difference; at most ± clip. The deviation is 1 where all have the same reward."""

    mean: float = 0.0
    deviation: float = 1.0
    clip: float = math.inf

    @classmethod
    def of(cls, rewards: Tensor, clip: float = math.inf) -> Scale:
        """Of (N,) rewards."""
        return cls(rewards.mean().item(), rewards.std().item() or 1.0 if len(rewards) > 1 else 1.0, clip)

    def __call__(self, rewards: Tensor) -> Tensor:
        return ((rewards - self.mean) / self.deviation).clamp(-self.clip, self.clip)


@dataclass(frozen=True)
class Reward:
    """A reward by its name."""

    name: str
    function: Function
    weight: float = 1.0
    file: Path | None = None  # of a user's

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """A number for each completion, not weighted. UserError, which names the reward and the sample, if the function
        raises or returns anything else."""
        given = list(prompts), list(completions)
        try:
            returned: Any = self.function(*given, **{name: list(values) for name, values in columns.items()})
        except Exception as error:
            raise UserError(f"the reward {self.name} raised {own_code.exception(error)}") from error
        try:
            values = [float(value) for value in returned]
        except (TypeError, ValueError):
            raise UserError(
                f"the reward {self.name} must return a list of numbers, not {str(returned)[:60]!r}"
            ) from None
        if len(values) != len(completions):
            raise UserError(f"the reward {self.name} returned {len(values)} numbers for {len(completions)} completions")
        for value, text in zip(values, completions, strict=True):
            if not math.isfinite(value):
                raise UserError(f"the reward {self.name} is {value} for the completion {text[:60]!r}")
        return values


def find(name: str) -> Reward:
    """The reward of a name, with a weight after `*`. UserError if there is none."""
    which, star, factor = name.rpartition("*")
    which, weight = (which, number(name, factor)) if star else (name, 1.0)
    place, colon, what = which.rpartition(":")
    if not colon:
        if which not in REWARDS:
            raise UserError(
                f"there is no reward '{which}': the rewards are {', '.join(REWARDS)}, or file.py:function"
                f"{nearest(which, REWARDS)}"
            )
        return Reward(which, REWARDS[which][1], weight)
    module = own_code.module(which, place)
    function = getattr(module, what, None)
    if not callable(function):
        offers = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise UserError(f"'{place}' has no function '{what}'{nearest(what, offers)}")
    return Reward(which, function, weight, Path(module.__file__) if module.__file__ else None)


def number(name: str, factor: str) -> float:
    try:
        weight = float(factor)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--reward {name}: '{factor}' is not a weight: write name*0.5")
    return weight


def total(
    rewards: Sequence[Reward], prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
) -> tuple[list[float], dict[str, list[float]]]:
    """(the weighted sum for each completion, name → the numbers of each reward, not weighted)."""
    each = {reward.name: reward(prompts, completions, **columns) for reward in rewards}
    sums = [sum(r.weight * each[r.name][i] for r in rewards) for i in range(len(completions))]
    return sums, each
