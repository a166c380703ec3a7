"""GAE in four variants: by definition, by recursion, as one matrix, as a parallel scan. All equal the op `gae`.

    δ_t = r_t + γ · (1 − terminated_t) · V(next state of t) − V_t
    A_t = Σ_k (γλ)^k δ_{t+k}, up to the end of t's segment

Each maps the TD errors δ (T, N), the ends of segments (T, N) bool and γλ to the advantages (T, N). In `VARIANTS` they
have the op's arguments: rewards, values, next_values, terminated, truncated, γ and λ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune import ops
from finetune.rl.advantages import td_errors
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config


def by_definition(deltas: Tensor, ends: Tensor, decay: float) -> Tensor:
    """The sum, term by term: T² / 2 additions in a row without ends."""
    advantages = torch.zeros_like(deltas)
    for row in range(deltas.shape[1]):
        for t in range(len(deltas)):
            for k in range(len(deltas) - t):
                advantages[t, row] += decay**k * deltas[t + k, row]
                if ends[t + k, row]:
                    break
    return advantages


def by_recursion(deltas: Tensor, ends: Tensor, decay: float) -> Tensor:
    """A_t = δ_t + γλ · A_{t+1}, backwards, starting again at an end. The loop of most code bases."""
    advantages = torch.empty_like(deltas)
    next_advantage = torch.zeros_like(deltas[0])  # (N,)
    for t in reversed(range(len(deltas))):
        next_advantage = deltas[t] + (decay * next_advantage).masked_fill(ends[t], 0.0)
        advantages[t] = next_advantage
    return advantages


def as_matrix(deltas: Tensor, ends: Tensor, decay: float) -> Tensor:
    """A = M δ with M[t, k] = (γλ)^(k − t) for k ≥ t in the same segment: one product, T² memory."""
    segment = ends.cumsum(0) - ends.long()  # (T, N): ends before t
    steps = torch.arange(len(deltas))
    distance = steps - steps[:, None]  # (T, T): k − t
    powers = torch.where(distance >= 0, decay ** distance.clamp(min=0).to(deltas.dtype), 0.0)
    same = segment[:, None] == segment[None]  # (T, T, N)
    return torch.einsum("tk,tkn,kn->tn", powers, same.to(deltas.dtype), deltas)


def by_scan(deltas: Tensor, ends: Tensor, decay: float) -> Tensor:
    """A parallel scan: step t maps A_{t+1} to δ_t + c_t · A_{t+1}; such maps compose associatively, so log₂ T rounds
    suffice. In round i each step composes its map of 2^i steps with the next one, as a GPU's scan does."""
    offset, factor = deltas, decay * (~ends).to(deltas.dtype)
    reach = 1
    while reach < len(offset):
        behind = torch.zeros_like(offset)
        behind[:-reach] = offset[reach:]
        offset = torch.where(factor == 0, offset, offset + factor * behind)  # avoids 0 · NaN behind an end
        shifted = torch.zeros_like(factor)
        shifted[:-reach] = factor[reach:]
        factor = factor * shifted
        reach *= 2
    return offset


def of_rollout(variant: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """The variant with the op's arguments."""

    def advantages(
        rewards: Tensor,
        values: Tensor,
        next_values: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        gamma: float,
        lam: float,
    ) -> Tensor:
        deltas = td_errors(rewards, values, next_values, terminated, gamma)
        return variant(deltas, terminated | truncated, gamma * lam)

    return advantages


VARIANTS = {
    "definition": of_rollout(by_definition),
    "recursion": of_rollout(by_recursion),
    "matrix": of_rollout(as_matrix),
    "scan": of_rollout(by_scan),
}


def report(cfg: Config, run: Run) -> None:
    """On random numbers with ends: the largest difference of each variant from the op, and the time of op and loops."""
    g = run.generator("ways")

    def numbers(steps: int, rows: int, dtype: torch.dtype) -> list[Tensor]:
        floats = [torch.randn(steps, rows, generator=g, dtype=dtype) for _ in range(3)]
        return [*floats, *(torch.rand(steps, rows, generator=g) < 0.03 for _ in range(2))]

    given = numbers(97, 5, torch.float64)
    exact, _ = ops.gae(*given, gamma=cfg.gamma, lam=cfg.lam)
    found = {name: variant(*given, cfg.gamma, cfg.lam) for name, variant in VARIANTS.items()}
    differences = {name: float((advantages - exact).abs().max()) for name, advantages in found.items()}
    scale = max(1.0, float(exact.abs().max()))
    run.check("variants_largest_difference", max(differences.values()) / scale, at_most=1e-12)
    given = numbers(cfg.bench_steps, cfg.bench_rows, torch.float32)
    timed = {
        "op": lambda: ops.gae(*given, gamma=cfg.gamma, lam=cfg.lam),
        "recursion": lambda: VARIANTS["recursion"](*given, cfg.gamma, cfg.lam),
        "scan": lambda: VARIANTS["scan"](*given, cfg.gamma, cfg.lam),
    }
    took = dict.fromkeys(timed, math.inf)
    for _ in range(20):  # in turn, so that a busy machine is busy for all
        for name, compute in timed.items():
            began = perf_counter()
            compute()
            took[name] = min(took[name], perf_counter() - began)
    run.check("op_faster_than_recursion", took["recursion"] / took["op"])
    run.table(
        f"variants of GAE: difference from the op, and time relative to it at {cfg.bench_steps} × {cfg.bench_rows}",
        [
            {
                "variant": name,
                "largest difference": f"{differences[name]:.1e}" if name in differences else "–",
                "time": f"{took[name] / took['op']:.0f} ×" if name in took else "–",
            }
            for name in ["op", *VARIANTS]
        ],
    )
