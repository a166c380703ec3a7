"""PPO of a language model's answers: sample, score, pay for the distance from the reference, learn in several passes.

    r_t = −β (log π_old − log π_ref)(y_t) + [t is the last token] · score     A, G = A + V = GAE(r, V)
    L = −mean(min(ρ A, clip(ρ, 1 ± ε) A)) + c_v ½ mean(max((V − G)², (V_old ± ε_v − G)²)) − c_e mean(H)

ρ = π / π_old. Ziegler et al. 2019 (arXiv:1909.08593), InstructGPT (arXiv:2203.02155). Reads top to bottom: the models,
a rollout, its update, the loop, evaluation, then data and files. The formulas of tokens are those of
finetune/alignment/ppo_lm.py; [Ln] is the number of a detail of language models in the README.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune import memory, ops, optim
from finetune.alignment import kl, logprobs, openings, ppo_lm, preferences, rewards, samples
from finetune.alignment.reward_model import ScoreHead
from finetune.alignment.rewards import Scale
from finetune.alignment.rollouts import Prompt, Sampler, mismatch, rollouts
from finetune.alignment.samples import Estimate
from finetune.alignment.toy_writer import learn_to_write, toy_tokenizer
from finetune.data import packing
from finetune.data.packing import IGNORE, Batch, Document
from finetune.data.toy_directory import small_config, small_llama
from finetune.errors import UserError
from finetune.lm.io import hub, load
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer, stop_ids
from finetune.peft import adapters, bases, lora
from finetune.rl.agents.surrogate import explained_variance
from finetune.runs.run import Run

from . import plots

if TYPE_CHECKING:
    from .main import Config

PROMPT_ROOM = 24  # tokens of an opening and its start, for the memory formulas


# --- Models


@dataclass(frozen=True)
class Outputs:
    """What policy and critic say of the learned tokens of a batch, (n,) each."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor  # before each token


class Models(nn.Module):
    """Policy, critic and reference on one set of frozen weights [L1]. The policy is the adapter "policy". The critic is
    a head on the policy's states (shared), or an adapter and head of its own (separate) [L7]. The reference is the
    weights alone, or with the adapter "sft" that the policy began as."""

    def __init__(self, cfg: Config, model: Llama, generator: torch.Generator) -> None:
        super().__init__()
        self.cfg, self.model = cfg, model.eval()  # [L5] no dropout: π / π_old compares policies, not masks
        self.head = ScoreHead(model.config.dim, 1, generator)
        self.head.weight.data.zero_()  # [L8] at first V = 0, the mean of the normalized scores
        self.critic = "policy" if cfg.critic == "shared" else "value"
        for name in dict.fromkeys(("policy", self.critic)):
            self.add(name, generator)
        for name, p in model.named_parameters():
            p.requires_grad_(any(f".parts.{which}." in name for which in ("policy", "value")))
        self.wear("policy")

    def add(self, name: str, generator: torch.Generator) -> None:
        """An adapter that changes nothing yet, or is a copy of "sft"."""
        cfg = self.cfg
        if "sft" in lora.names(self.model):
            adapters.load_adapter(self.model, hub.resolve(cfg.model), name)
        else:
            lora.apply_lora(self.model, cfg.rank, cfg.alpha, 0.0, lora.parse_targets(cfg.targets), generator, name=name)

    def wear(self, name: str) -> None:
        """Switches to this adapter; to the weights alone where there is none of that name."""
        lora.activate(self.model, {name: 1.0} if name in lora.names(self.model) else {})

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def outputs(self, batch: Batch) -> Outputs:
        learned = batch.targets[0] != IGNORE
        states = self.states(batch)[learned]
        found = logprobs.of_states(self.model, states, batch.targets[0, learned], self.cfg.temperature)  # [L4]
        if self.critic != "policy":
            self.wear(self.critic)
            states = self.states(batch)[learned]
            self.wear("policy")
        return Outputs(*found, self.head(states)[:, 0])

    def states(self, batch: Batch) -> Tensor:
        """(T, C): the states after the last norm, from which token t + 1 is chosen and its value read."""
        return self.model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens, hidden=True)[0]

    @torch.no_grad()
    def logprobs(self, batch: Batch, name: str = "policy") -> Tensor:
        """(n,): those of an adapter; of the reference with "sft" [L1]."""
        self.wear(name)
        found = logprobs.token_logprobs(self.model, batch, self.cfg.temperature)
        self.wear("policy")
        return found


# --- A rollout


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer as they were sampled, the end token included if the model gave one [L3]; its text."""

    prompt: Prompt
    ids: list[int]
    text: str
    sampled: Tensor  # (n,) log-probabilities that the sampler drew the tokens with

    def document(self) -> Document:
        return Document([*self.prompt.ids, *self.ids], [0] * len(self.prompt.ids) + [1] * len(self.ids))


Score = Callable[[Sequence[Answer]], list[float]]


def ask(
    cfg: Config, sampler: Sampler, tokenizer: Tokenizer, prompts: Sequence[Prompt], generator: torch.Generator
) -> list[Answer]:
    """An answer of the policy as it is now to each prompt, by the engine that serves models."""
    sampler.refresh()
    found = rollouts(
        sampler, tokenizer, [p.ids for p in prompts], 1, cfg.new_tokens, temperature=cfg.temperature,
        stop_ids=stop_ids(sampler.policy, tokenizer), generator=generator,
    )  # fmt: skip
    return [Answer(p, r.answers[0], r.texts[0], r.sampled[0]) for p, r in zip(prompts, found, strict=True)]


# --- Its update


class Learner:
    """The models, their optimizer and β."""

    def __init__(self, cfg: Config, models: Models) -> None:
        self.cfg, self.models, self.chosen = cfg, models, cfg.chosen()
        parameters = list(models.trained.values())
        self.optimizer = optim.AdamW(optim.decay_groups(parameters, 0.0), lr=self.chosen.lr, eps=cfg.adam_eps)
        self.beta = {"value": cfg.beta}

    @property
    def state(self) -> dict[str, Any]:
        return {"trained": self.models.trained, "optimizer": self.optimizer, "beta": self.beta}

    def update(self, answers: Sequence[Answer], scores: Tensor, rate: float, rng: torch.Generator) -> dict[str, float]:
        """Several passes over the answers with their scores (N,); `rate` of the learning rate. Returns the metrics."""
        cfg, count = self.cfg, len(answers)
        order = torch.randperm(count, generator=rng)
        documents, size = [answers[i].document() for i in order], -(-count // self.chosen.minibatches)
        sampled = torch.cat([answers[i].sampled for i in order])
        e = self.experience(documents, scores[order], sampled, size)
        seen: list[dict[str, float]] = []
        first: dict[str, float] = {}
        passes = 0
        for passes in range(1, self.chosen.epochs + 1):
            divergence = []
            for some in (torch.arange(count) if passes == 1 else torch.randperm(count, generator=rng)).split(size):
                found = self.minibatch([documents[i] for i in some], e.rows(some), rate)
                first = first or {"first_ratio": found["largest"], "first_clip_fraction": found["clip_fraction"]}
                divergence.append(found["kl"])
                seen.append(found)
            if cfg.target_kl is not None and sum(divergence) / len(divergence) > cfg.target_kl:
                break
        means = {name: sum(each[name] for each in seen) / len(seen) for name in seen[0] if name != "largest"}
        explained = explained_variance(e.values, e.targets) if len(e.targets) > 1 else e.targets.new_tensor(torch.nan)
        shown = {} if explained.isnan() else {"explained_variance": max(-10.0, explained.item())}
        beta = self.beta["value"]
        if cfg.kl_aim is not None:  # [L6]
            controller = kl.AdaptiveCoefficient(beta, cfg.kl_aim, cfg.kl_horizon)
            controller.update(e.kl, count)
            self.beta["value"] = controller.value
        return means | shown | first | mismatch(e.old, sampled) | {"answer_kl": e.kl, "beta": beta, "passes": passes}

    @torch.no_grad()
    def experience(
        self, documents: Sequence[Document], scores: Tensor, sampled: Tensor, size: int
    ) -> ppo_lm.Experience:
        """Rewards, advantages and targets by the policy and critic of before the update, in the minibatches of the
        first pass: there the ratio is 1 to the last bit [L4]."""
        cfg, columns = self.cfg, []
        for start in range(0, len(documents), size):
            batch = packing.collate(documents[start : start + size])
            now = self.models.outputs(batch)
            owner = start + logprobs.owners(batch)
            columns.append((owner, now.logprobs, self.models.logprobs(batch, "sft"), now.values))
        owner, old, reference, values = (torch.cat(column) for column in zip(*columns, strict=True))
        return ppo_lm.experience(
            scores, old, reference, values, owner, self.beta["value"], gamma=self.chosen.gamma, lam=cfg.lam,
            whiten=cfg.normalize_advantages, sampler=sampled,
        )  # fmt: skip

    def minibatch(self, documents: Sequence[Document], e: ppo_lm.Experience, rate: float) -> dict[str, float]:
        """One step of the optimizer."""
        cfg = self.cfg
        now = self.models.outputs(packing.collate(documents))
        found = ppo_lm.losses(now.logprobs, now.values, e, clip=cfg.clip, value_clip=cfg.value_clip)
        entropy = now.entropies.mean()
        (found.policy + cfg.value_weight * found.value - self.chosen.entropy * entropy).backward()
        gradients = [p.grad for p in self.models.trained.values() if p.grad is not None]
        norm = ops.clip_grad_norm_(gradients, cfg.max_norm)
        self.optimizer.step(lr=rate * self.chosen.lr)
        self.optimizer.zero_grad()
        return {
            "policy_loss": found.policy.item(), "value_loss": found.value.item(), "entropy": entropy.item(),
            "kl": found.approximate_kl, "clip_fraction": found.clip_fraction, "grad_norm": float(norm),
            "value_clip_fraction": found.value_clip_fraction,
            "largest": (now.logprobs.detach() - e.old).abs().max().item(),
        }  # fmt: skip


# --- The loop


def main(cfg: Config, run: Run) -> dict[str, Any]:
    shape, setup = memory_plan(cfg)
    memory.check_memory(shape, setup, "--answers or --new-tokens, or more --minibatches")
    tokenizer, model = load_model(cfg, run)
    prompts, held_out = load_prompts(cfg, tokenizer)
    models = Models(cfg, model, run.generator("lora"))
    learner, score = Learner(cfg, models), scorer(cfg)
    sampler = Sampler(model, None if cfg.sampler == "same" else cfg.sampler)  # [L9]
    first = taste(cfg, run, models, sampler, tokenizer, held_out, score)
    # [L2]
    scale = Scale.of(torch.tensor(first.scores), cfg.clip_rewards) if cfg.normalize_rewards else Scale()
    run.print(f"{len(prompts):,} prompts, {sum(p.numel() for p in models.trained.values()):,} parameters are trained")

    past: dict[str, Any] = {"during": ""}
    for step in run.steps(cfg.steps, learner.state | {"past": past}, phase="answers"):
        some = packing.batch_indices(len(prompts), cfg.answers, step, lambda epoch: run.generator("epoch", epoch))
        answers = ask(cfg, sampler, tokenizer, [prompts[i] for i in some], run.generator("answers", step))
        scores, rng = score(answers), run.generator("update", step)
        learned = scale(torch.tensor(scores))
        if cfg.shuffle:
            learned = learned[torch.randperm(len(learned), generator=rng)]
        rate = 1 - step / cfg.steps if cfg.anneal else 1.0
        found = learner.update(answers, learned, rate, rng)
        tokens = sum(len(answer.ids) for answer in answers) / len(answers)
        run.log(step, score=sum(scores) / len(scores), tokens=tokens, **found)
        if step + 1 == cfg.steps // 2:
            during = ask(cfg, sampler, tokenizer, held_out, run.generator("samples"))
            past["during"] = json.dumps([answer.text for answer in during])

    save_policy(cfg, models, tokenizer, run)  # first: whatever fails below, what was trained is kept
    last = taste(cfg, run, models, sampler, tokenizer, held_out, score)
    texts = [answer.prompt.text for answer in last.answers]
    samples.show(run, texts, first.texts, json.loads(past["during"] or "[]"), last.texts)
    report(cfg, run, first, last)
    if cfg.steps:
        plots.language(cfg, run, first.score.mean)
    measure_memory(cfg, run, shape, setup, learner, last.answers)
    return {"trained_parameters": sum(p.numel() for p in models.trained.values())}


# --- Evaluation


@dataclass(frozen=True)
class Taste:
    """Answers to held-out prompts, their scores, and log π − log π_ref of each."""

    answers: list[Answer]
    scores: list[float]
    kls: list[float]

    @property
    def score(self) -> Estimate:
        return Estimate.of(self.scores)

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]


@torch.no_grad()
def taste(
    cfg: Config, run: Run, models: Models, sampler: Sampler, tokenizer: Tokenizer, prompts: Sequence[Prompt],
    score: Score,
) -> Taste:  # fmt: skip
    """The same prompts and random numbers each time, so that what differs is the policy."""
    answers = ask(cfg, sampler, tokenizer, prompts, run.generator("samples"))
    kls: list[float] = []
    for part in logprobs.chunks([answer.document() for answer in answers], 2048):
        batch = packing.collate(part)
        kls += logprobs.sequence_sums(models.logprobs(batch) - models.logprobs(batch, "sft"), batch).tolist()
    return Taste(answers, score(answers), kls)


def report(cfg: Config, run: Run, first: Taste, last: Taste) -> None:
    """The results. With the project's rewards the score has to rise by 1.5; with a user's it has to rise."""
    own = cfg.data is not None or (bool(cfg.reward) and cfg.reward != ("vader",))
    wanted = first.score.mean + (0.0 if own else 1.5)
    run.result("sample_reward", last.score.mean, error=last.score.error, baseline=first.score.mean, target=wanted)
    divergence = sum(last.kls) / len(last.kls)
    run.result("sample_kl", divergence, baseline=0.0, target=None if own else 10.0, higher=False)
    run.result("distinct_2", samples.distinct(last.texts), baseline=samples.distinct(first.texts))
    series = run.metrics.series()
    if cfg.steps:
        for check, metric in (("first_log_ratio", "first_ratio"), ("first_clipped", "first_clip_fraction")):
            run.check(check, max(series[f"answers: {metric}"][1]), at_most=0.0)


# --- Data and rewards


def load_prompts(cfg: Config, tokenizer: Tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to train on, --samples held-out ones): those of --data, or openings."""
    if cfg.data is None:
        count = cfg.prompts + cfg.eval_prompts
        texts = openings.toy_openings() if cfg.model == "scratch" else openings.openings(count)
        found = [Prompt(text, tokenizer.encode(text)) for text in texts]
    else:
        rows = preferences.read(cfg.data, "prompts", cfg.raw)
        found = [
            Prompt(preferences.shown(row.prompt), preferences.prompt_ids(tokenizer, row.prompt), row.columns)
            for row in rows
        ]
    if len(found) < 2:
        raise UserError(f"{cfg.data} has one prompt: a second one is needed to evaluate on")
    found = random.Random(0).sample(found, len(found))
    held_out = min(cfg.eval_prompts, max(1, len(found) // 5))
    asked = found[-held_out:] * -(-cfg.samples // held_out)  # several answers to each where prompts are few
    return found[:-held_out], asked[: cfg.samples]


def scorer(cfg: Config) -> Score:
    """The sum of the rewards; without --reward vader's, of the toy good words less bad ones."""
    named = [rewards.find(name) for name in cfg.reward or ("vader",)]

    def score(answers: Sequence[Answer]) -> list[float]:
        prompts, texts = [a.prompt.text for a in answers], [a.text for a in answers]
        if cfg.model == "scratch" and not cfg.reward:
            return openings.toy_score(prompts, texts)
        names = dict.fromkeys(name for a in answers for name in a.prompt.columns)
        columns = {name: [a.prompt.columns.get(name) for a in answers] for name in names}
        return rewards.total(named, prompts, texts, **columns)[0]

    return score


# --- Model and files


def load_model(cfg: Config, run: Run) -> tuple[Tokenizer, Llama]:
    """Tokenizer and reference: a model, a model with an adapter of sft, or from scratch one that learns to write."""
    dtype = getattr(torch, cfg.dtype)
    if cfg.model == "scratch":
        tokenizer = toy_tokenizer()
        model = small_llama(small_config(tokenizer.vocab_size, PROMPT_ROOM + cfg.new_tokens))
        learn_to_write(run, model, tokenizer, cfg.sft_steps)
        return tokenizer, model.to(dtype)
    source = bases.model_of(run, cfg.model)
    if not bases.is_adapter(source):
        return load.tokenizer(source), load.llama(source, dtype)
    base = bases.base_folder(source, None, run.console)
    model = load.llama(base, dtype)
    with bases.of(base):
        adapters.load_adapter(model, source, "sft")
    return load.tokenizer(bases.tokenizer_source(base, source)), model


def save_policy(cfg: Config, models: Models, tokenizer: Tokenizer, run: Run) -> None:
    """The adapter as peft opens it, or the toy's whole model, with the tokenizer."""
    base = None
    if cfg.model != "scratch":
        source = hub.resolve(cfg.model)
        base = str(bases.base_folder(source)) if bases.is_adapter(source) else bases.base_name(cfg.model)
    adapters.save_trained(models.model, tokenizer, run.dir / "model", base, "policy")
    run.next_commands = bases.next_commands(run.dir)[: 1 if cfg.model == "scratch" else None]


def memory_plan(cfg: Config) -> tuple[LlamaConfig, memory.Setup]:
    """What is trained and how, for the memory formulas; nothing is loaded. The answers of a minibatch lie end to end.
    A separate critic is a second adapter, through which the tokens go once more."""
    if cfg.model == "scratch":
        shape = small_config(toy_tokenizer().vocab_size, PROMPT_ROOM + cfg.new_tokens)
    else:
        source = hub.resolve(cfg.model) if cfg.model != "smollm2" else None
        folder = bases.base_folder(source) if source and bases.is_adapter(source) else cfg.model
        shape = load.llama_config(folder)
    if PROMPT_ROOM + cfg.new_tokens > shape.max_length:
        raise UserError(f"--new-tokens {cfg.new_tokens}: the model's longest text is {shape.max_length} tokens")
    networks = 1 if cfg.critic == "shared" else 2
    return shape, memory.Setup(
        batch=1,
        seq=networks * (PROMPT_ROOM + cfg.new_tokens) * -(-cfg.answers // cfg.chosen().minibatches),
        dtype="fp32" if cfg.dtype == "float32" else "bf16",
        lora_rank=networks * cfg.rank,
        lora_targets=",".join(lora.parse_targets(cfg.targets)),
        loss="logprobs",
    )


def measure_memory(
    cfg: Config, run: Run, shape: LlamaConfig, setup: memory.Setup, learner: Learner, answers: Sequence[Answer]
) -> None:
    """The memory of a minibatch's step next to its prediction."""
    documents = [answer.document() for answer in answers[: -(-cfg.answers // learner.chosen.minibatches)]]
    batch = packing.collate(documents)
    setup = replace(setup, seq=batch.tokens.numel() * (1 if cfg.critic == "shared" else 2))

    def loss() -> Tensor:
        now = learner.models.outputs(batch)
        return now.logprobs.mean() + now.values.mean()

    memory.record_step(run, shape, setup, model=learner.models.model, optimizer=learner.optimizer, loss=loss)
