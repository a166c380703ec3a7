"""PPO against stable-baselines3's: environment steps per second with the same networks, environments and updates.

    python -m finetune bench ppo_vs_sb3 [--horizon 128] [--epochs 5] [--rounds 6] [--updates 2] [--json FILE] [--keep]

Both learn CartPole-v1 in eight environments in one process on one thread: two tanh layers of 64 each for the policy and
for V, Adam, eight minibatches a pass, clipped ratios and values, advantages normalized in every minibatch. Ours copies
their weights at the start; unless both then compute the same probabilities and values, nothing is timed. They take
turns of --updates rollouts with their updates. A ratio is the median over the rounds (above 1: ours is faster). Needs
the peers extra: pip install -e '.[peers]'.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import harness
import torch
from sb3 import MISSING, copy_weights, in_turns

from finetune.errors import UserError
from finetune.rl.envs import environments
from finetune.rl.envs.vector import VectorEnv
from finetune.runs import registry

ENVS, WIDTH, MINIBATCHES = 8, 64, 8


def both(horizon: int, epochs: int) -> tuple[Any, Any]:
    """Our PPO and stable-baselines3's, with the same weights. It does not normalize observations and rewards, which it
    leaves to a wrapper, so ours does not either."""
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.logger import Logger
    except ImportError:
        raise UserError(MISSING) from None

    config = registry.load(registry.find("ppo")).Config
    cfg = config(horizon=horizon, epochs=epochs, minibatches=MINIBATCHES, hidden=WIDTH, lr=1e-3, entropy=0.01,
                 normalize_observations=False, normalize_rewards=False)  # fmt: skip
    torch.manual_seed(0)
    ours = registry.part("ppo", "ppo").PPO(cfg, VectorEnv(environments.make("CartPole-v1", ENVS), 0))
    theirs = PPO(
        "MlpPolicy", make_vec_env("CartPole-v1", ENVS, seed=0), learning_rate=1e-3, n_steps=horizon, n_epochs=epochs,
        batch_size=horizon * ENVS // MINIBATCHES, gamma=0.99, gae_lambda=cfg.lam, clip_range=cfg.clip,
        clip_range_vf=cfg.value_clip, ent_coef=0.01, vf_coef=cfg.value_weight, max_grad_norm=cfg.max_norm,
        policy_kwargs={"net_arch": {"pi": [WIDTH, WIDTH], "vf": [WIDTH, WIDTH]}}, device="cpu",
    )  # fmt: skip
    theirs.set_logger(Logger(None, []))
    copy_weights(ours, theirs)
    return ours, theirs


def measure(horizon: int, epochs: int, rounds: int, updates: int) -> dict[str, Any]:
    ours, theirs = both(horizon, epochs)
    rng = torch.Generator().manual_seed(0)
    steps = updates * horizon * ENVS
    sides = {
        "ours": lambda: [ours.step(1.0, rng) for _ in range(updates)],
        "sb3": lambda: theirs.learn(steps, log_interval=10**9, reset_num_timesteps=False),
    }
    return {"horizon": horizon, "epochs": epochs} | in_turns(sides, steps, rounds)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m finetune bench ppo_vs_sb3", description=__doc__.split("\n")[0])
    p.add_argument("--horizon", type=int, default=128, help="steps of each environment an update (128)")
    p.add_argument("--epochs", type=int, default=5, help="passes over them (5)")
    p.add_argument("--rounds", type=int, default=6, help="timed rounds (6)")
    p.add_argument("--updates", type=int, default=2, help="updates a round and side (2)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    p.add_argument("--keep", action="store_true", help="also write them to benches/results/ppo_vs_sb3/<machine>.json")
    wanted = p.parse_args(argv)
    if min(wanted.horizon, wanted.epochs, wanted.rounds, wanted.updates) < 1:
        p.error("--horizon, --epochs, --rounds and --updates must be at least 1")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        found = measure(wanted.horizon, wanted.epochs, wanted.rounds, wanted.updates)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    ratio, speed = found["ratio"], found["steps_per_second"]
    print(
        f"horizon {wanted.horizon}, {wanted.epochs} passes: {speed['ours']:,.0f} steps/s, stable-baselines3 "
        f"{speed['sb3']:,.0f}: ours {ratio['median']:.2f}× as fast ({ratio['p20']:.2f} … {ratio['p80']:.2f})"
    )
    about = harness.header() | {"threads": 1}
    kept = harness.KEPT / "ppo_vs_sb3" / f"{harness.slug(about)}.json"
    for path in [wanted.json] * bool(wanted.json) + [kept] * wanted.keep:
        harness.write_report(path, {"machine": about, "results": [found]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
