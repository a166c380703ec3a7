"""Updates per second of discrete CQL and of d3rlpy's DiscreteCQL: same steps, network, weights and batch, one thread.

    python -m finetune bench cql_vs_d3rlpy [--rounds 30] [--updates 50] [--json FILE]

Rounds of `--updates` updates alternate in one process on one thread and are timed by its CPU seconds, which other work
on the machine hardly changes; a ratio is the median of the rounds' ratios (above 1: ours is faster). An update is what
`fit` does: sample a batch, loss, gradient, Adam, target network. `d3rlpy, batch given` omits the sampling on d3rlpy's
side only, to show its share of the difference. Both losses of a first batch must be equal, or nothing is timed. Needs
d3rlpy, which the Makefile installs for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import Times

from finetune.errors import UserError
from finetune.rl.agents.networks import QNetwork
from finetune.rl.envs import logged_data
from finetune.runs import machine, registry

BATCH, HIDDEN, ALPHA, GAMMA, LR = 64, 64, 1.0, 0.99, 1e-3


def sides(data: logged_data.Dataset) -> tuple[dict[str, Callable[[], None]], float]:
    """(name → one update, relative difference of the two losses on the same first batch)"""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # old gym's notice
            import d3rlpy
    except ImportError as e:
        raise UserError(f"this bench needs d3rlpy ({e}): make bench installs it") from None
    d3rlpy.logging.LOG.disabled = True
    from d3rlpy.torch_utility import TorchMiniBatch

    CQL = registry.part("cql", "cql_discrete").CQL
    torch.manual_seed(0)
    ours = CQL(QNetwork(4, 2, [HIDDEN] * 2), alpha=ALPHA, gamma=GAMMA, lr=LR, tau=0.005)
    config = d3rlpy.algos.DiscreteCQLConfig(
        learning_rate=LR, batch_size=BATCH, gamma=GAMMA, alpha=ALPHA, target_update_interval=100,
        encoder_factory=d3rlpy.models.VectorEncoderFactory([HIDDEN] * 2),
    )  # fmt: skip
    theirs = config.create(device="cpu:0")
    theirs.create_impl((4,), 2)
    for modules in (theirs.impl.q_function, theirs.impl._modules.targ_q_funcs):
        linears = [m for m in modules.modules() if isinstance(m, torch.nn.Linear)]
        for a, b in zip(ours.q.net[::2], linears, strict=True):
            b.load_state_dict(a.state_dict())
    logged = d3rlpy.dataset.MDPDataset(
        observations=data.observations.numpy(), actions=data.actions.numpy()[:, None], rewards=data.rewards.numpy(),
        terminals=data.terminations.numpy().astype("float32"), timeouts=data.truncations.numpy().astype("float32"),
        action_space=d3rlpy.ActionSpace.DISCRETE,
    )  # fmt: skip

    steps, rng = data.transitions(), torch.Generator().manual_seed(0)
    given = TorchMiniBatch.from_batch(logged.sample_transition_batch(BATCH), GAMMA, False, "cpu:0")
    same = type(steps)(given.observations, given.actions[:, 0].long(), given.rewards[:, 0], given.next_observations,
                       given.terminals[:, 0] > 0)  # fmt: skip
    td, gap, _ = ours.loss(same)
    mine = (td + ALPHA * gap).item()
    difference = abs(mine / theirs.impl.compute_loss(given, theirs.impl.compute_target(given)).loss.item() - 1)
    return {
        "ours": lambda: ours.update(steps.sample(BATCH, rng)),
        "d3rlpy": lambda: theirs.update(logged.sample_transition_batch(BATCH)),
        "d3rlpy, batch given": lambda: theirs.impl.update(given, 1),
    }, difference


def measure(rounds: int, updates: int) -> dict:
    torch.set_num_threads(1)
    calls, difference = sides(logged_data.generate("CartPole-v1", "random", 10_000, 0))
    if not difference <= 1e-5:
        raise UserError(f"the losses of the first batch differ by {difference:.1e}: nothing was timed")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):  # two to warm up
        for name in [*calls][:: 1 if i % 2 else -1]:
            began = time.process_time()
            for _ in range(updates):
                calls[name]()
            times[name].append((time.process_time() - began) / updates)
    kept = {name: values[2:] for name, values in times.items()}
    ratios = {
        name: Times.of([b / a for a, b in zip(kept["ours"], values, strict=True)]) for name, values in kept.items()
    }
    return {
        "updates_per_second": {name: 1 / statistics.median(values) for name, values in kept.items()},
        "ratio": {name: dataclasses.asdict(ratio) for name, ratio in ratios.items() if name != "ours"},
        "loss_difference": difference,
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m finetune bench cql_vs_d3rlpy", description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=30, help="rounds of each side")
    p.add_argument("--updates", type=int, default=50, help="updates of a round")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    wanted = p.parse_args(argv)
    try:
        found = measure(wanted.rounds, wanted.updates)
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    for name, rate in found["updates_per_second"].items():
        ratio = found["ratio"].get(name)
        times = f", {ratio['median']:.2f}× ours ({ratio['p20']:.2f} … {ratio['p80']:.2f})" if ratio else ""
        print(f"{name}: {rate:,.0f} updates/s{times}")
    print(f"losses of the first batch within {found['loss_difference']:.0e}")
    if wanted.json:
        wanted.json.write_text(json.dumps({"machine": machine.describe(), "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
