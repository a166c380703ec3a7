"""A2C against stable-baselines3's: environment steps per second with the same networks and environments.

    python -m finetune bench a2c_vs_sb3 [--horizon 5 16] [--rounds 12] [--steps 2000] [--json FILE]

Both learn CartPole-v1 in eight environments in one process on one thread, with Adam, an update a horizon, and two tanh
layers of 64 each for the policy and for V. Ours copies their weights at the start; unless both then compute the same
probabilities and values, nothing is timed. They take turns of --steps steps. A ratio is the median over the rounds
(above 1: ours is faster). Needs the peers extra: pip install -e '.[peers]'.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from sb3 import MISSING, copy_weights, in_turns

from finetune.errors import UserError
from finetune.rl.envs import environments
from finetune.rl.envs.vector import VectorEnv
from finetune.runs import machine, registry

ENVS, WIDTH, LR, CLIP = 8, 64, 1e-3, 1000.0


def both(horizon: int) -> tuple[Any, Any]:
    """Our A2C and stable-baselines3's, with the same weights."""
    try:
        from stable_baselines3 import A2C
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.logger import Logger
    except ImportError:
        raise UserError(MISSING) from None

    config = registry.load(registry.find("actor_critic")).Config
    cfg = config(horizon=horizon, envs=ENVS, hidden=WIDTH, lr=LR, clip=CLIP, value_scale=1.0, entropy=0.01)
    torch.manual_seed(0)
    ours = registry.part("actor_critic", "a2c").A2C(cfg, VectorEnv(environments.make("CartPole-v1", ENVS), 0))
    theirs = A2C(
        "MlpPolicy", make_vec_env("CartPole-v1", ENVS, seed=0), learning_rate=LR, n_steps=horizon, gamma=cfg.gamma,
        gae_lambda=1.0, ent_coef=cfg.entropy, vf_coef=cfg.value_weight, max_grad_norm=CLIP, use_rms_prop=False,
        policy_kwargs={"net_arch": {"pi": [WIDTH, WIDTH], "vf": [WIDTH, WIDTH]}}, device="cpu",
    )  # fmt: skip
    theirs.set_logger(Logger(None, []))
    copy_weights(ours, theirs)
    return ours, theirs


def measure(horizon: int, rounds: int, steps: int) -> dict[str, Any]:
    ours, theirs = both(horizon)
    rng = torch.Generator().manual_seed(0)
    each = horizon * ENVS
    steps = each * max(1, round(steps / each))
    sides = {
        "ours": lambda: ours.train_for(steps, 1.0, rng),
        "sb3": lambda: theirs.learn(steps, log_interval=10**9, reset_num_timesteps=False),
    }
    return {"horizon": horizon} | in_turns(sides, steps, rounds)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m finetune bench a2c_vs_sb3", description=__doc__.split("\n")[0])
    p.add_argument("--horizon", nargs="+", type=int, default=[5, 16], help="steps of each environment an update (5 16)")
    p.add_argument("--rounds", type=int, default=12, help="timed rounds (12)")
    p.add_argument("--steps", type=int, default=2000, help="steps of the environments a round and side (2000)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    wanted = p.parse_args(argv)
    if min(*wanted.horizon, wanted.rounds, wanted.steps) < 1:
        p.error("--horizon, --rounds and --steps must be at least 1")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        found = [measure(horizon, wanted.rounds, wanted.steps) for horizon in wanted.horizon]
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for r in found:
        ratio, speed = r["ratio"], r["steps_per_second"]
        print(
            f"horizon {r['horizon']}: {speed['ours']:,.0f} steps/s, stable-baselines3 {speed['sb3']:,.0f}: "
            f"ours {ratio['median']:.2f}× as fast ({ratio['p20']:.2f} … {ratio['p80']:.2f})"
        )
    if wanted.json:
        wanted.json.write_text(json.dumps({"machine": machine.describe(), "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
