"""Proximal policy optimization: clipped surrogate and KL penalty, discrete and continuous, and what its details do.

    L = −mean(min(r A, (1 ± ε) A)) + c_v mean((V − G)²) − c_e mean(H)        r = π(a|s) / π_old(a|s)

ppo.py is the algorithm, from networks to loop. This file trains it from several seeds and compares; ablation.py
switches its details off one by one. The README explains every metric and lists the 37 details.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from finetune.alignment import rewards
from finetune.errors import UserError
from finetune.peft import lora
from finetune.rl.envs import environments
from finetune.rl.statistics import mean_and_error
from finetune.runs import config
from finetune.runs.run import Run

from . import ablation, lm, plots, ppo
from .lm import memory_plan as memory_plan  # of --task lm; the networks of control take no memory to speak of

OBJECTIVES: tuple[Literal["clip", "kl"], ...] = ("clip", "kl")


@dataclass
class Config(config.Config):
    threads: int = 1  # networks of this size are fastest on one
    # updates; control: of --envs times --horizon environment steps each, just below 100,000; lm: of --answers answers
    steps: int = 97
    checkpoint_every: int = 50
    task: Literal["control", "lm"] = "control"  # environments, or the answers of a language model
    # compare: both objectives on every environment; ablation: details switched off one by one, on the first one
    experiment: Literal["compare", "ablation"] = "compare"
    # a gymnasium id, or an environment of your own (actor_critic's README); may be given several times
    env: tuple[str, ...] = ("CartPole-v1", "Pendulum-v1")
    env_arg: tuple[str, ...] = ()  # keyword arguments of --env, such as size=8; may be given several times
    # steps after which an episode is truncated if its environment sets no time limit
    max_episode_steps: int = config.bounded(1000, at_least=1, at_most=10**6)
    objectives: str = "clip,kl"  # what `compare` trains, separated by commas
    repeats: int = config.bounded(3, at_least=1, at_most=1000)  # trainings of each, from other weights and episodes
    eval_episodes: int = config.bounded(20, at_least=1, at_most=10_000)  # before and after a training
    shuffle: bool = False  # control: advantages in a random order, from which nothing can be learned

    # --- rollout
    envs: int = config.bounded(8, at_least=1, at_most=1000)  # environments in parallel
    horizon: int = config.bounded(128, at_least=1, at_most=10**6)  # steps of each in an update
    bootstrap: bool = True  # V of the state that a time limit cut off counts; off: a time limit is an end
    normalize_observations: bool = True  # by their running mean and deviation
    clip_observations: float = config.bounded(10.0, above=0, at_most=10**6)  # in standard deviations
    normalize_rewards: bool = True  # by the running deviation of the discounted return
    clip_rewards: float = config.bounded(10.0, above=0, at_most=10**6)  # in units of it

    # --- advantages
    # none: 0.99, with continuous actions 0.9
    gamma: float | None = config.bounded(None, at_least=0, at_most=1)
    lam: float = config.bounded(0.95, at_least=0, at_most=1)  # of GAE
    normalize_advantages: bool = True  # mean 0 and deviation 1 in every minibatch

    # --- networks
    hidden: int = config.bounded(64, at_least=1, at_most=8192)  # width of the two hidden layers
    shared: bool = False  # one network for policy and value, with two last layers
    orthogonal: bool = True  # initial weights; off: torch's own
    policy_scale: float = config.bounded(0.01, above=0, at_most=10**6)  # of the policy's last layer

    # --- update
    objective: Literal["clip", "kl"] = "clip"  # of the ablation; `compare` sets it
    clip: float = config.bounded(0.2, at_least=0, at_most=10**6)  # of the ratios
    kl_weight: float = config.bounded(1.0, above=0, at_most=10**6)  # kl: the penalty's weight at the start
    kl_target: float = config.bounded(0.01, above=0, at_most=10**6)  # kl: nats an update, to which the weight adapts
    # passes over the steps of an update; none: 5, with continuous actions 10
    epochs: int | None = config.bounded(None, at_least=1, at_most=1000)
    # of a pass; none: 8, with continuous actions 16
    minibatches: int | None = config.bounded(None, at_least=1, at_most=10**6)
    # an update ends after the pass whose KL divergence from the old policy exceeds this; none: never
    target_kl: float | None = config.bounded(None, above=0, at_most=10**6)
    value_weight: float = config.bounded(0.5, at_least=0, at_most=10**6)  # of the critic's loss
    # V counts as at most this far from its value before the update; none: no such bound
    value_clip: float | None = config.bounded(0.2, above=0, at_most=10**6)
    # weight of the entropy; none: 0.01, with continuous actions 0
    entropy: float | None = config.bounded(None, at_least=0, at_most=10**6)
    # Adam's learning rate; none: 0.002, with continuous actions 0.001
    lr: float | None = config.bounded(None, at_least=0, at_most=10)
    anneal: bool = True  # it falls to 0 over the training
    adam_eps: float = config.bounded(1e-5, above=0, at_most=1)
    max_norm: float = config.bounded(0.5, above=0, at_most=10**6)  # of the gradient of all parameters

    # --- language model (--task lm)
    # smollm2, the folder of a model or of an adapter (of sft) to start from, a hub id, or scratch: a small new Llama
    model: str = "smollm2"
    # rows of prompts (.jsonl, .json, .csv, .tsv, .parquet); none: openings that a text can go on from, well or badly
    data: Path | None = None
    raw: bool = False  # --data: texts are continued as they stand; else they are messages for the chat template
    # vader, length, …, file.py:function, with a weight name*0.5; may be given several times; none: vader
    reward: tuple[str, ...] = ()
    prompts: int = config.bounded(1000, at_least=1, at_most=10**6)  # openings to train on
    eval_prompts: int = config.bounded(200, at_least=1, at_most=10**6)  # held-out prompts
    samples: int = config.bounded(128, at_least=1, at_most=1 << 16)  # answers to them before and after
    answers: int = config.bounded(16, at_least=1, at_most=1 << 16)  # sampled in an update
    new_tokens: int = config.bounded(24, at_least=1, at_most=1 << 16)  # most tokens of an answer
    temperature: float = config.bounded(1.0, at_least=1e-3, at_most=100)  # of sampling, and of log π
    critic: Literal["shared", "separate"] = "shared"  # a head on the policy's states, or a network of its own
    beta: float = config.bounded(0.4, at_least=0, at_most=10**6)  # what a nat from the reference costs, at first
    # nats an answer, to which the cost adapts; none: it stays
    kl_aim: float | None = config.bounded(6.0, above=0, at_most=10**6)
    kl_horizon: float = config.bounded(100.0, above=0, at_most=10**9)  # answers in which the cost adapts
    # the copy of the policy that answers are sampled from, in this format; same: the policy itself
    sampler: Literal["bf16", "int8", "same"] = "bf16"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the frozen weights; what is trained is float32
    rank: int = config.bounded(16, at_least=1, at_most=1 << 16)  # of the adapters
    alpha: float = config.bounded(32.0, above=0, at_most=10**6)  # they are scaled by alpha / rank
    targets: str = ",".join(lora.TARGETS)  # adapted layers; all-linear: those
    sft_steps: int = config.bounded(250, at_least=1, at_most=10**9)  # scratch: steps in which it learns to write

    # --- ablation
    ablation_updates: int = config.bounded(24, at_least=1, at_most=10**6)  # of a training, at most --steps
    ablation_seeds: int = config.bounded(5, at_least=2, at_most=1000)  # trainings with each detail off

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=60, env=("CartPole-v1",), repeats=1, model="scratch", dtype="float32", new_tokens=12,
                   answers=64, sampler="same", kl_aim=4.0, beta=0.2)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.objectives.split(","):
            if name not in OBJECTIVES:
                raise UserError(f"--objectives: '{name}' is not one of {', '.join(OBJECTIVES)}")
        lora.parse_targets(self.targets)
        for name in self.reward:
            rewards.find(name)

    def chosen(self) -> ppo.Chosen:
        """Of --task lm: what the settings say, and the usual values where they are `none`."""
        return ppo.given(self, ppo.TOY_ANSWERS if self.model == "scratch" else ppo.ANSWERS)


def main(cfg: Config, run: Run) -> dict[str, Any]:
    if cfg.task == "lm":
        return lm.main(cfg, run)
    limit = environments.EpisodeLimit(cfg.max_episode_steps, run.print)
    made = {}
    for env in cfg.env if cfg.experiment == "compare" else cfg.env[:1]:  # all before anything is trained
        made[env] = environments.make(env, cfg.envs, episode_limit=limit, args=cfg.env_arg)
    if cfg.experiment == "ablation":
        ablation.compare(cfg, run, *next(iter(made.items())))
        return limit.summary()
    trained: dict[str, dict[str, list[ppo.Training]]] = {}
    for env, envs in made.items():
        for objective in (o for o in OBJECTIVES if o in cfg.objectives.split(",")):
            name, its = label(env, objective), replace(cfg, objective=objective)
            trainings = [ppo.train(its, run, env, i, envs, cfg.steps, name) for i in range(cfg.repeats)]
            trained.setdefault(env, {})[objective] = trainings
            report(run, env, objective, name, trainings)
    if cfg.steps:
        series = run.metrics.series()
        ratios = [max(ys) for name, (_, ys) in series.items() if name.endswith(": first_ratio")]
        run.check("first_log_ratio", max(ratios), at_most=0.0)  # of every update's first minibatch
        plots.returns(cfg, run, made)
        plots.diagnostics(cfg, run, next(iter(made)))
    return limit.summary()


def label(env: str, objective: str) -> str:
    """cartpole_clip for CartPole-v1 and clip."""
    stem = env.rpartition(":")[2].rpartition("/")[2].partition("-v")[0]
    return f"{''.join(c if c.isalnum() else '_' for c in stem).lower()}_{objective}"


def report(run: Run, env: str, objective: str, name: str, trainings: list[ppo.Training]) -> None:
    """The return after training, and of the clipped objective the steps until it was reached first."""
    before, _ = mean_and_error([t.before for t in trainings])
    after, error = mean_and_error([t.after for t in trainings])
    target = ppo.SOLVED.get(env)
    if target is not None and run.toy:
        target = 400.0 if name == "cartpole_clip" else None
    run.result(f"return_{name}", after, error=error, baseline=before, target=target)
    if target is not None and objective == "clip":
        run.check(f"steps_{name}", median(t.steps for t in trainings))
        run.check(f"solved_{name}", sum(t.solved for t in trainings) / len(trainings))
