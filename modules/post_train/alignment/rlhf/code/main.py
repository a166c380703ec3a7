"""Reinforcement learning from human feedback: InstructGPT in one folder (Ouyang et al. 2022, arXiv:2203.02155).

    1. sft.py      a language model learns to answer as demonstrations do
    2. reward.py   a copy of it learns from pairs which of two answers people prefer
    3. policy.py   another copy learns to answer so that the reward model likes it, near the model of stage 1

Each stage is a checkpoint that the next one starts from (stages.py: adapters on the same weights). Here a gold reward
stands for the people: it orders the pairs, and in the end it tells what the reward model, its proxy, was worth. Reads
top to bottom: settings, the three stages, results, parts. The README explains every metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, log
from pathlib import Path
from typing import Any, Literal

import torch

from finetune import memory
from finetune.alignment import logprobs, rewards
from finetune.alignment.reward_model import RewardModel, ValueModel
from finetune.alignment.rewards import Scale
from finetune.alignment.samples import Estimate
from finetune.alignment.toy_writer import toy_tokenizer
from finetune.data import packing
from finetune.data.toy_directory import small_config, small_llama
from finetune.errors import UserError
from finetune.lm.io import load, save
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.memory import meters
from finetune.peft import adapters, bases, lora
from finetune.runs import checkpoint, config, reading
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import data, plots, policy, reward, sft, stages
from .data import Answer, Pair, Score, Sets
from .policy import Stage, Taste
from .stages import wear

SCALED = 256  # answers of the SFT model that give the rewards their zero and unit


@dataclass
class Config(config.Config):
    steps: int = 40  # of stage 3
    checkpoint_every: int = 10
    model: str = "smollm2"  # a model folder, a .gguf file, smollm2, a hub id, or scratch: a small new Llama
    # a run of this module: its models of stages 1 and 2 are taken, and stage 3 begins at once
    start: Path | None = None
    # --- Data
    # pairs that people ordered (.jsonl, .json, .csv, .tsv, .parquet) or a folder; none: the model's own, by --gold
    data: Path | None = None
    raw: bool = False  # --data: texts are continued as they stand; else they are messages for the chat template
    gold: str | None = None  # stands for people: vader, length, …, file.py:function; none: vader, with --data nothing
    prompts: int = bounded(800, at_least=1, at_most=10**6)  # openings of all three stages
    answers: int = bounded(2, at_least=2, at_most=1 << 10)  # to each of them, of which neighbors are paired
    eval_prompts: int = bounded(64, at_least=1, at_most=10**6)  # held out from all three
    eval_answers: int = bounded(12, at_least=2, at_most=1 << 10)  # to each of them, for held-out pairs and best-of-n
    new_tokens: int = bounded(24, at_least=1, at_most=1 << 16)  # most tokens of a sampled answer
    max_length: int = bounded(512, at_least=8, at_most=1 << 26)  # tokens of prompt and answer; longer ones are skipped
    temperature: float = bounded(1.0, at_least=1e-3, at_most=100)  # of sampling
    # --- 1. Demonstrations
    demonstrations: int = bounded(400, at_least=1, at_most=10**7)  # answers to take them from
    sft_steps: int = bounded(40, at_least=0, at_most=10**9)
    sft_batch: int = bounded(16, at_least=1, at_most=1 << 20)  # demonstrations of a step
    sft_lr: float = bounded(1e-3, at_least=0)
    # --- 2. Reward model
    reward_steps: int = bounded(75, at_least=0, at_most=10**9)
    reward_batch: int = bounded(8, at_least=1, at_most=1 << 20)  # pairs of a step
    reward_lr: float = bounded(1e-3, at_least=0)
    gap: float = bounded(0.5, at_least=0)  # least difference of gold rewards of a pair that is trained on
    pooling: Literal["mean", "last"] = "mean"  # the head reads the mean over the answer's states, or the last one
    heads: int = bounded(1, at_least=1, at_most=64)  # more than one: an ensemble
    caution: float = bounded(0.0, at_least=0)  # standard deviations of the heads that are subtracted from their mean
    margin: float = bounded(0.0, at_least=0)  # how much margin a unit of the gap asks for
    centering: float = bounded(0.01, at_least=0)  # weight of (r_w + r_l)², which holds the middle at 0
    flipped: float = bounded(0.0, at_least=0, at_most=1)  # control: share of the training pairs that is turned round
    # --- 3. Policy
    policy: Literal["ppo", "rloo", "grpo", "best_of_n"] = "ppo"
    # what scores answers: the reward model; the gold reward; or a control, a reward model that says 0 to all
    reward: Literal["model", "gold", "constant"] = "model"
    lr: float = bounded(1e-3, at_least=0)
    batch: int = bounded(32, at_least=1, at_most=1 << 20)  # answers of a step
    group: int = bounded(4, at_least=1, at_most=1 << 16)  # of them to each prompt
    passes: int = bounded(1, at_least=1, at_most=1 << 10)  # over the answers of a step
    beta: float = bounded(0.1, at_least=0)  # of the KL to the SFT model
    kl_target: float = bounded(0.0, at_least=0)  # nats an answer, to which beta is adapted; 0: beta is fixed
    kl_horizon: float = bounded(1000.0, above=0)  # answers in which it follows
    reward_clip: float = bounded(5.0, at_least=0)  # largest reward, in standard deviations (gold: in its unit); 0: none
    length_penalty: float = bounded(0.0, at_least=0)  # of a token
    unfinished: float = bounded(0.5, at_least=0)  # penalty of an answer without its end
    clip_ratio: float = bounded(0.2, at_least=0)  # of π / π_old
    value_clip: float = bounded(0.2, at_least=0)  # ppo: largest move of a value in an update; 0: none
    gamma: float = bounded(1.0, at_least=0, at_most=1)  # ppo: discount
    lam: float = bounded(0.95, at_least=0, at_most=1)  # ppo: λ of GAE
    beyond: int = bounded(12, at_least=0, at_most=10**9)  # steps without KL and clip after the result, for the picture
    # --- Adapters and optimizer, of all stages
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights; adapters and optimizer stay in float32
    rank: int = bounded(16, at_least=1, at_most=1 << 16)  # LoRA: rank of the update
    alpha: float = bounded(32.0, above=0)  # LoRA: the update is scaled by alpha / rank
    targets: str = ",".join(lora.TARGETS)  # LoRA: adapted layers
    warmup: int = bounded(5, at_least=0, at_most=10**9)  # steps until the peak; from there a cosine to a tenth
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    # --- Evaluation
    samples: int = bounded(64, at_least=1, at_most=1 << 16)  # answers of the base, SFT and final model

    @classmethod
    def toy(cls) -> Config:
        return cls(
            steps=60, model="scratch", prompts=120, answers=12, eval_prompts=80, eval_answers=8, new_tokens=8,
            max_length=48, demonstrations=4000, sft_steps=200, sft_batch=48, sft_lr=3e-3, reward_steps=120,
            reward_batch=16, gap=1.0,
            lr=2e-3, batch=64, beyond=30, dtype="float32", checkpoint_every=20, samples=128,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if "head" in lora.parse_targets(self.targets):
            raise UserError("--targets: the head is shared by all stages and cannot have an adapter; omit it")
        if self.batch % self.group:
            raise UserError(f"--batch {self.batch} must be a multiple of --group {self.group}")
        if self.policy != "ppo" and self.group < 2:
            raise UserError(f"--policy {self.policy} compares answers to the same prompt: give --group 2 or more")
        if self.policy == "best_of_n" and (self.passes > 1 or self.kl_target):
            raise UserError("--policy best_of_n imitates answers once and knows no KL: omit --passes and --kl-target")
        if self.caution and self.heads < 2:
            raise UserError("--caution needs heads that can differ: give --heads 2 or more")
        if self.data is not None and (self.gold is None) and (self.margin or self.reward == "gold"):
            raise UserError("--data has no gold rewards: give --gold, or omit --margin and --reward gold")
        if self.gold is not None:
            rewards.find(self.gold)


def main(cfg: Config, run: Run) -> dict[str, Any]:
    # What cannot fit is refused by the formulas, before the model is read.
    shape, setup = memory_plan(cfg)
    if cfg.max_length > shape.max_length:
        raise UserError(f"--max-length {cfg.max_length}: the model's own is {shape.max_length}")
    memory.check_memory(shape, setup, "--batch, --new-tokens or --max-length")
    tokenizer, model = load_model(cfg, run)
    sets = data.own(cfg, tokenizer) if cfg.data is None else data.read(cfg, tokenizer, run.print)
    gold = data.scorer(cfg)

    # 1. The model learns to answer as the demonstrations do.
    first = stage_one(cfg, run, model, tokenizer, sets)

    # Answers of the SFT model, ordered by the gold reward; or the pairs that people ordered.
    groups, pairs, held_out = collect(cfg, run, model, tokenizer, sets, gold)

    # 2. A copy learns which of two answers is better.
    judge, quality = stage_two(cfg, run, model, tokenizer, pairs, held_out)
    raw = reward.scores(judge, scaled(cfg, groups[0], pairs), cfg.caution)
    of_gold = Scale() if gold is None else Scale.of(torch.tensor(data.judged(gold, flat(groups[0])[:SCALED])))

    # 3. Another copy learns to answer so that the reward model likes it.
    stages.new_adapter(cfg, run, model, "policy", like="sft")
    stages.new_adapter(cfg, run, model, "value", like="reward")
    value = ValueModel(model)
    value.begin_from(judge)
    asked = [sets.held_out[i % len(sets.held_out)] for i in range(cfg.samples)]
    stage = Stage(cfg, model, tokenizer, judge, value, Scale.of(raw), gold, asked)
    trained = stages.parameters(model, "policy", "value") if cfg.policy == "ppo" else stages.parameters(model, "policy")
    before, frozen = policy.taste(stage, run, "sft"), checkpoint.fingerprint(stages.frozen(model))
    head = judge.head.weight.clone()
    midway = policy.train(stage, run, sets.prompts, cfg.steps)

    # Saved first: whatever fails below, what was trained is kept.
    wear(model, "policy")
    base = None if cfg.model == "scratch" else bases.base_name(cfg.model)  # from scratch: the whole model
    adapters.save_trained(model, tokenizer, run.dir / "model", base, "policy")
    after = policy.taste(stage, run, "policy")
    same = checkpoint.fingerprint(stages.frozen(model)) == frozen and torch.equal(head, judge.head.weight)
    run.check("reference_and_reward_model_unchanged", float(same), at_least=1.0)
    show(run, first, before, midway, after)
    report(cfg, run, quality, first, before, after)
    measure_memory(cfg, run, shape, setup, stage, before.answers)

    # And further, with nothing that holds the policy: where the proxy and the gold reward part.
    if cfg.beyond:
        free = replace(stage, cfg=replace(cfg, beta=0.0, kl_target=0.0, reward_clip=0.0))
        policy.train(free, run, sets.prompts, cfg.beyond, "beyond")
        last = policy.taste(stage, run, "policy")
        checkpoint.write_json(run.dir / "beyond.json", described(last))
        for name, mean in last.means().items():
            run.check(f"beyond_{name}", mean)
    best = [] if cfg.data else best_of(cfg, groups[1], judge, gold, stage.proxy, of_gold)
    plots.overoptimization(run, of_gold if gold else None, best)
    plots.reward_model(run, quality)
    run.next_commands = bases.next_commands(run.dir)[: 1 if cfg.model == "scratch" else None]
    run.check("pairs", len(pairs))
    run.check("trained_parameters", sum(p.numel() for p in trained.values()))
    return {}


# --- The stages


def stage_one(cfg: Config, run: Run, model: Llama, tokenizer: Tokenizer, sets: Sets) -> list[Answer]:
    """Trains and saves the SFT model, or takes that of --start; returns what the model answered before."""
    asked = [sets.held_out[i % len(sets.held_out)] for i in range(cfg.samples)]
    first = data.ask(cfg, model, tokenizer, asked, 1, run.generator("samples"))
    if cfg.start is not None:
        if cfg.model != "scratch":
            adapters.load_adapter(model, cfg.start / "sft", "sft")
        return first
    if not sets.demonstrations:
        prompts = sets.prompts[: cfg.demonstrations]
        with run.console.status("sampling") as status:
            answers = data.ask_all(
                cfg, model, tokenizer, prompts, 1, run.generator("demonstrations"), run.dir / "demonstrations.json",
                status.update,
            )  # fmt: skip
        sets.demonstrations = data.demonstrate(flat(answers), tokenizer)
    packing.check_vocabulary(sets.demonstrations, model.config.vocab_size)
    run.print(f"1. supervised fine-tuning on {len(sets.demonstrations):,} demonstrations")
    if cfg.model != "scratch":
        stages.new_adapter(cfg, run, model, "sft", like="")
    sft.train(cfg, run, model, sets.demonstrations)
    if cfg.model == "scratch":
        save.model(model, run.dir / "sft", tokenizer)
    else:
        save_adapter(cfg, model, tokenizer, run.dir / "sft", "sft")
    return first


def collect(
    cfg: Config, run: Run, model: Llama, tokenizer: Tokenizer, sets: Sets, gold: Score | None
) -> tuple[tuple[list[list[Answer]], list[list[Answer]]], list[Pair], list[Pair]]:
    """((answers to the prompts, to held-out prompts), pairs to train on, held-out pairs)."""
    if cfg.data is not None:
        packing.check_vocabulary([d for p in sets.pairs for d in (p.chosen, p.rejected)], model.config.vocab_size)
        return ([], []), sets.pairs, sets.held_out_pairs
    assert gold is not None
    wear(model, "sft")
    found = []
    for name, prompts, each in (("pairs", sets.prompts, cfg.answers), ("held_out", sets.held_out, cfg.eval_answers)):
        with run.console.status("sampling") as status:
            file = (cfg.start or run.dir) / f"{name}.json"
            found.append(data.ask_all(cfg, model, tokenizer, prompts, each, run.generator(name), file, status.update))
    pairs, held_out = data.pairs_of(found[0], gold, cfg.gap), data.pairs_of(found[1], gold, 0.0)
    if not pairs or not held_out:
        raise UserError(
            f"of {len(found[0])} pairs of answers none differs by --gap {cfg.gap:g}: lower it, or raise --prompts"
        )
    return (found[0], found[1]), pairs, held_out


def stage_two(
    cfg: Config, run: Run, model: Llama, tokenizer: Tokenizer, pairs: Sequence[Pair], held_out: Sequence[Pair]
) -> tuple[RewardModel, reward.Quality]:
    """Trains and saves the reward model, or takes that of --start; how good it is on held-out pairs."""
    if cfg.start is not None:
        adapters.load_adapter(model, cfg.start / "reward", "reward")
        judge = RewardModel(model)
        judge.load(cfg.start / "reward")
    else:
        run.print(f"2. reward model from {len(pairs):,} pairs, {len(held_out):,} held out")
        stages.new_adapter(cfg, run, model, "reward", like="sft")
        judge = RewardModel(model, cfg.pooling, cfg.heads, run.generator("head"))
        reward.train(cfg, run, judge, pairs)
        save_adapter(cfg, model, tokenizer, run.dir / "reward", "reward")
        judge.save(run.dir / "reward")
    found = reward.quality(judge, held_out)
    judge.requires_grad_(False)
    if cfg.reward == "constant":
        judge.head.weight.zero_()
    return judge, found


def scaled(cfg: Config, answers: list[list[Answer]], pairs: Sequence[Pair]) -> list[Any]:
    """The documents whose rewards give the scale: answers of the SFT model, or the pairs of --data."""
    if cfg.data is None:
        return [answer.document() for answer in flat(answers)[:SCALED]]
    return [d for p in pairs[: SCALED // 2] for d in (p.chosen, p.rejected)]


def flat(groups: Sequence[Sequence[Answer]]) -> list[Answer]:
    return [answer for group in groups for answer in group]


def best_of(
    cfg: Config,
    groups: Sequence[Sequence[Answer]],
    judge: RewardModel,
    gold: Score | None,
    of_proxy: Scale,
    of_gold: Scale,
) -> list[tuple[float, float, float]]:
    """(KL, proxy, gold) of the best of n = 1 … answers of the SFT model by the proxy, on their scales. Of the N answers
    to a prompt the one of rank i (from 0) is the best of n drawn ones with probability C(i, n − 1) / C(N, n)."""
    assert gold is not None
    size = len(groups[0])
    proxy = of_proxy(reward.scores(judge, [a.document() for a in flat(groups)], cfg.caution)).view(-1, size)
    true = of_gold(torch.tensor([data.judged(gold, group) for group in groups]))
    proxy, order = proxy.sort(1)
    true = true.gather(1, order)
    found = []
    for n in range(1, size + 1):
        weights = torch.tensor([comb(i, n - 1) / comb(size, n) for i in range(size)])
        found.append((best_of_n_kl(n), (proxy @ weights).mean().item(), (true @ weights).mean().item()))
    return found


def best_of_n_kl(n: int) -> float:
    """KL(best of n ‖ one), where no two answers have the same reward; else it is less (Stiennon et al. 2020,
    arXiv:2009.01325, appendix G.3; Beirami et al. 2024, arXiv:2401.01879)."""
    return log(n) - (n - 1) / n


# --- Results


def described(taste: Taste) -> list[dict[str, Any]]:
    rows = []
    for i, answer in enumerate(taste.answers):
        row = {"prompt": answer.prompt.text, "answer": answer.text, "proxy": taste.proxy[i], "kl": taste.kls[i]}
        rows.append(row | ({"gold": taste.gold[i]} if taste.gold else {}))
    return rows


def show(run: Run, first: Sequence[Answer], before: Taste, midway: Sequence[str], after: Taste) -> None:
    """Six prompts and their answers by the models of the stages; answers.json keeps all."""
    rows = []
    for i, (base, one, other) in enumerate(zip(first, before.answers, after.answers, strict=True)):
        row = {"prompt": base.prompt.text, "base": base.text, "sft": one.text}
        rows.append(row | ({"during": midway[i]} if i < len(midway) else {}) | {"policy": other.text})
    run.table("answers of the three models", [{k: r[k] for k in ("prompt", "base", "sft", "policy")} for r in rows[:6]])
    checkpoint.write_json(run.dir / "answers.json", rows)


def report(
    cfg: Config, run: Run, quality: reward.Quality, first: Sequence[Answer], before: Taste, after: Taste
) -> None:
    """The results; the default run and the toy have targets, any other has to beat its own start."""
    own = cfg.data is not None or cfg.gold not in (None, "vader") or (cfg.model not in ("smollm2", "scratch"))
    toy = cfg.model == "scratch"
    start, end = before.means(), after.means()
    ended = sum(a.ended for a in before.answers) / len(before.answers)
    run.check("sft_finished", ended)
    run.check("base_finished", sum(a.ended for a in first) / len(first))
    run.check("policy_finished", sum(a.ended for a in after.answers) / len(after.answers))
    run.result("reward_accuracy", quality.accuracy, baseline=0.5, target=0.5 if own else 0.8 if toy else 0.7)
    if quality.clear_accuracy == quality.clear_accuracy:
        run.result("clear_accuracy", quality.clear_accuracy, baseline=0.5, target=0.5 if own else 0.85 if toy else 0.75)
    run.check("calibration_error", quality.calibration_error)
    run.result("proxy_reward", end["proxy"], error=Estimate.of(after.proxy).error, baseline=start["proxy"],
               target=start["proxy"] if own else None)  # fmt: skip
    if after.gold:
        target = start["gold"] if own else start["gold"] + 1.5 if toy else 2.5
        run.result(
            "gold_reward", end["gold"], error=Estimate.of(after.gold).error, baseline=start["gold"], target=target
        )
    run.result(
        "policy_kl",
        end["kl"],
        error=Estimate.of(after.kls).error,
        baseline=0.0,
        target=None if own else 10.0,
        higher=False,
    )
    run.result("distinct_2", end["distinct_2"], baseline=start["distinct_2"], target=None if own or toy else 0.7)


def measure_memory(
    cfg: Config, run: Run, shape: LlamaConfig, setup: memory.Setup, stage: Stage, answers: Sequence[Answer]
) -> None:
    """A step of stage 3 next to its prediction: the policy's pass, and what the other models need next to it. Without
    ppo there is no value model."""
    run.print("measuring the memory of a step …")
    batch, model = packing.collate([answer.document() for answer in answers[: cfg.batch]]), stage.model
    setup = replace(setup, seq=batch.tokens.numel())
    mine = {name: stages.parameters(model, name) for name in ("sft", "reward", "value", "policy")}
    optimizer = stages.with_states(mine["policy"].values())
    wear(model, "policy")
    measured = memory.measure(model, optimizer, lambda: logprobs.token_logprobs(model, batch).sum())
    measured["logits"] = meters.loss_bytes(model, memory.shape_of(shape), setup)
    sizes = {name: sum(p.nbytes for p in tensors.values()) for name, tensors in mine.items()}
    measured["weights"] -= sizes["sft"] + sizes["reward"] + sizes["value"]
    measured["reward model"] = sizes["reward"] + stage.reward.head.weight.nbytes
    if cfg.model != "scratch":
        measured["reference model"] = sizes["sft"]
    if cfg.policy == "ppo":
        trained = [*stages.parameters(model, "value").values(), stage.value.head.weight]
        states = meters.optimizer_bytes(stages.with_states(trained))
        measured["value model"] = 2 * sum(p.nbytes for p in trained) + states
        wear(model, "value")
        measured["value model's activations"] = meters.saved_bytes(model, lambda: stage.value(batch).sum())
    predicted = {term.name: term.bytes for term in memory.predict(memory.shape_of(shape), setup)}
    run.record_memory(memory.table(predicted, measured))
    stages.parameters(model, *(("policy", "value") if cfg.policy == "ppo" else ("policy",)))


# --- Model and files


def load_model(cfg: Config, run: Run) -> tuple[Tokenizer, Llama]:
    """Tokenizer and base model; from scratch a small one that cannot write yet, or that of --start."""
    if cfg.start is not None:
        check_start(cfg)
        for name in ("sft", "reward"):
            run.depends_on(name, cfg.start / name)
    dtype = getattr(torch, cfg.dtype)
    if cfg.model != "scratch":
        source = bases.model_of(run, cfg.model)
        return load.tokenizer(source), load.llama(source, dtype)
    if cfg.start is not None:
        return load.tokenizer(cfg.start / "sft"), load.llama(cfg.start / "sft", dtype)
    tokenizer = toy_tokenizer()
    return tokenizer, small_llama(small_config(tokenizer.vocab_size, cfg.max_length)).to(dtype)


def check_start(cfg: Config) -> None:
    """UserError if --start is not a folder with the models of stages 1 and 2."""
    assert cfg.start is not None
    for name in ("sft", "reward"):
        if not (reading.home_path(cfg.start) / name).is_dir():
            raise UserError(f"--start {cfg.start}: a run of rlhf has a folder {name}/ with its model; this has none")


def save_adapter(cfg: Config, model: Llama, tokenizer: Tokenizer, folder: Path, name: str) -> None:
    """The adapter of a stage as peft opens it, with the tokenizer."""
    base = str((cfg.start or folder.parent) / "sft") if cfg.model == "scratch" else bases.base_name(cfg.model)
    adapters.save_trained(model, tokenizer, folder, base, name)


def memory_plan(cfg: Config) -> tuple[LlamaConfig, memory.Setup]:
    """What is trained and how, for the memory formulas; nothing is loaded. Sampled answers end after --new-tokens."""
    if cfg.model == "scratch":
        shape = small_config(toy_tokenizer().vocab_size, cfg.max_length)
    else:
        shape = load.llama_config(cfg.model)
    longest = cfg.max_length if cfg.data else min(cfg.max_length, cfg.new_tokens + 12)
    return shape, memory.Setup(
        batch=1,
        seq=longest * max(cfg.batch, 2 * cfg.reward_batch),  # the answers of a step lie end to end in one row
        dtype="fp32" if cfg.dtype == "float32" else "bf16",
        lora_rank=cfg.rank,
        lora_targets=",".join(lora.parse_targets(cfg.targets)),
        algorithm="rlhf",
        loss="logprobs",
    )
