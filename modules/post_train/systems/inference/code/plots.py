"""Colors, titles and small sums that the pictures share."""

from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import Any

import torch

from finetune.runs.plots import INK

__all__ = [
    "AMBER",
    "BLUE",
    "GREEN",
    "GREY",
    "RED",
    "VIOLET",
    "exponential",
    "integral",
    "logarithmic",
    "median",
    "running_sum",
    "titled",
]
BLUE, GREEN, AMBER, RED, VIOLET, GREY = "#1769aa", "#2e7d32", "#b7791f", "#c53030", "#805ad5", "#7b8794"


def titled(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)


def integral(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """∫ y dx from 0 to each x, by trapezoids; before the first x, y is as at it."""
    parts = [(b - a) * (u + v) / 2 for a, b, u, v in zip(x, x[1:], y, y[1:], strict=False)]
    return list(accumulate(parts, initial=x[0] * y[0]))


def running_sum(values: Sequence[float]) -> list[float]:
    return list(accumulate(values))


def exponential(rng: torch.Generator) -> float:
    """A draw from the exponential distribution of mean 1."""
    return float(torch.empty(1).exponential_(generator=rng))


def logarithmic(axes: Any, side: str) -> None:
    """Makes the x or y axis logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    getattr(axes, f"set_{side}scale")("log")
    axis = getattr(axes, f"{side}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
