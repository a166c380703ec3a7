"""What the benches next to stable-baselines3 share: equal networks, and sides that take turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import Times

from finetune.errors import UserError

MISSING = "stable-baselines3 is not installed: pip install -e '.[peers]'"


def copy_weights(ours: Any, theirs: Any) -> None:
    """Gives our policy and V the weights of theirs. UserError unless both then compute the same."""
    parts = theirs.policy.mlp_extractor
    layers = [*parts.policy_net, theirs.policy.action_net, *parts.value_net, theirs.policy.value_net]
    own = [*ours.model.policy.net, *ours.model.value.net]
    pairs = zip(*([x for x in each if isinstance(x, torch.nn.Linear)] for each in (own, layers)), strict=True)
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    obs = torch.randn(64, 4)
    with torch.no_grad():
        log_probs, values = ours.model(obs)
        theirs_now: Any = theirs.policy.get_distribution(obs).distribution
        same = torch.allclose(log_probs, theirs_now.logits, atol=1e-5)
        same &= torch.allclose(values, theirs.policy.predict_values(obs)[:, 0], atol=1e-4)
    if not same:
        raise UserError("not timed: the two networks compute different outputs")


def in_turns(sides: dict[str, Callable[[], Any]], steps: int, rounds: int) -> dict[str, Any]:
    """Steps a second of each side, `ours` and `sb3`, over rounds of `steps`; ratio: above 1 ours is faster."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sides if number % 2 else reversed(sides):
            began = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - began)
    timed = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    return {
        "steps_per_second": {name: steps / statistics.median(values) for name, values in timed.items()},
        "ratio": dataclasses.asdict(Times.of([b / a for a, b in zip(timed["ours"], timed["sb3"], strict=True)])),
    }
