"""What PPO's details are worth: each is switched off alone, with the same seeds, and the returns are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from finetune.rl.envs.environments import Env
from finetune.rl.envs.evaluation import interval
from finetune.runs.run import Run

from . import plots
from .ppo import train

if TYPE_CHECKING:
    from .main import Config

# What is switched off: the settings that do so, and the detail's number in Huang et al. 2022.
OFF: dict[str, tuple[dict[str, Any], str]] = {
    "orthogonal weights": ({"orthogonal": False}, "2"),
    "small last layer": ({"policy_scale": 1.0}, "2"),
    "Adam's ε of 1e-5": ({"adam_eps": 1e-8}, "3"),
    "annealing": ({"anneal": False}, "4"),
    "GAE (λ = 1)": ({"lam": 1.0}, "5"),
    "minibatches": ({"minibatches": 1}, "6"),
    "normalized advantages": ({"normalize_advantages": False}, "7"),
    "clipped ratios": ({"clip": 1e6}, "8"),
    "clipped values": ({"value_clip": None}, "9"),
    "entropy bonus": ({"entropy": 0.0}, "10"),
    "gradient clipping": ({"max_norm": 1e6}, "11"),
    "separate networks": ({"shared": True}, "13"),
    "normalized observations": ({"normalize_observations": False}, "28"),
    "scaled rewards": ({"normalize_rewards": False}, "30"),
    "bootstrap at time limits": ({"bootstrap": False}, "–"),
}
ALL = "all details on"


@dataclass
class Row:
    """A set of trainings: mean returns of the fresh episodes after each, and the mean of each learning curve."""

    name: str
    after: list[float]
    speed: list[float]

    def loss(self, full: Row) -> tuple[float, float]:
        """What is lost against `full` in the mean of the curve, seed by seed: mean and half of its 95 % interval."""
        return interval([a - b for a, b in zip(full.speed, self.speed, strict=True)])


def compare(cfg: Config, run: Run, env: str, envs: list[Env]) -> list[Row]:
    """Trains with everything on and with each detail off, `--ablation-seeds` times. The mean of a learning curve is the
    area under it: how soon and how high."""
    updates = min(cfg.steps, cfg.ablation_updates)
    rows = []
    for name, (changes, _) in {ALL: ({}, ""), **OFF}.items():
        slug = "".join(c if c.isalnum() and c.isascii() else "_" for c in name).strip("_")
        its = replace(cfg, **changes)
        trainings = [train(its, run, env, seed, envs, updates, slug) for seed in range(cfg.ablation_seeds)]
        speed = [fmean(t.curve) if t.curve else fmean(t.before) for t in trainings]
        rows.append(Row(name, [fmean(t.after) for t in trainings], speed))
    full, *others = rows
    table = []
    for row in rows:
        number = OFF[row.name][1] if row is not full else ""
        cells = [f"{mean:.0f} ± {half:.0f}" for mean, half in (interval(row.speed), interval(row.after))]
        lost = "" if row is full else "{:.0f} ± {:.0f}".format(*row.loss(full))
        table.append({"off": row.name, "detail": number, "mean of the curve": cells[0], "after training": cells[1],
                      "lost": lost})  # fmt: skip
    run.table(f"{env}, {updates} updates, {cfg.ablation_seeds} seeds: means and 95 % intervals", table)
    worst = max(others, key=lambda row: row.loss(full)[0])
    mattering = sum(loss - half > 0 for loss, half in (row.loss(full) for row in others))
    run.result("curve_all_on", fmean(full.speed))
    run.result("curve_worst_off", fmean(worst.speed), baseline=fmean(full.speed))
    run.result("details_that_matter", mattering)  # their 95 % interval of what is lost is above 0
    plots.ablation(run, env, rows)
    return rows
