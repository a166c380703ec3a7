"""Stage 3, the policy: answer, have the answers scored, make better ones likelier, stay near the reference.

    J(π) = E_π[score(x, y)] − β · KL(π ‖ π_ref)                       InstructGPT (arXiv:2203.02155, eq. 2)

ppo        the KL is paid by each token, the score comes at the last one; a value network (begun as the reward model)
           says what each token was worth, and the clipped surrogate allows several passes over a batch
rloo       an answer is one action: R = score − β Σ_t (log π − log π_ref); its advantage is R minus the mean R of the
           other answers to the prompt (Ahmadian et al. 2024, arXiv:2402.14740)
grpo       (score − mean) / standard deviation of the group; the KL is in the loss (Shao et al. 2024, arXiv:2402.03300)
best_of_n  the best answer of each group is learned as a demonstration: rejection sampling (Llama 2, arXiv:2307.09288)

Losses take tensors of tokens only, so that a test trains the enumerated problem of finetune/alignment/gibbs.py by them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune import ops, optim
from finetune.alignment import group_advantages, kl, logprobs, policy_loss, ppo_lm, samples
from finetune.alignment.reward_model import RewardModel, ValueModel
from finetune.alignment.rewards import Scale
from finetune.data import packing
from finetune.data.packing import Batch
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer
from finetune.runs.metrics import MAIN
from finetune.runs.run import Run

from . import data, reward
from .data import Answer, Prompt, Score
from .stages import wear

if TYPE_CHECKING:
    from .main import Config


# --- The score of an answer


def score(cfg: Config, rewards: Tensor, lengths: Tensor, ended: Tensor) -> Tensor:
    """(N,): what the policy is trained on. Rewards on their scale are clipped, so that no single answer is worth any
    distance from the reference; then tokens and a missing end cost."""
    clipped = rewards.clamp(-cfg.reward_clip, cfg.reward_clip) if cfg.reward_clip else rewards
    return clipped - cfg.length_penalty * lengths - cfg.unfinished * ~ended


# --- The update


@dataclass(frozen=True)
class Rollout:
    """N answers in groups of `group` neighbors, n tokens end to end, as the policy that sampled them left them."""

    owner: Tensor  # (n,) int64, rising
    reference: Tensor  # (n,) log π_ref
    scores: Tensor  # (N,)
    group: int


@dataclass(frozen=True)
class Prepared:
    """What stays fixed over the passes of an update."""

    rollout: Rollout
    old: Tensor  # (n,) log π_old
    advantages: Tensor  # (N,), or (n,) of ppo
    experience: ppo_lm.Experience | None  # ppo's


def prepare(cfg: Config, beta: float, rollout: Rollout, old: Tensor, values: Tensor | None) -> Prepared:
    """Advantages from scores, log-probabilities and (ppo) values (n,) before the update."""
    old, groups = old.detach(), rollout.scores.view(-1, rollout.group)
    if cfg.policy == "ppo":
        assert values is not None
        e = ppo_lm.experience(
            rollout.scores, old, rollout.reference, values.detach(), rollout.owner, beta, gamma=cfg.gamma, lam=cfg.lam
        )
        return Prepared(rollout, old, e.advantages, e)
    if cfg.policy == "rloo":
        paid = rollout.scores - beta * sums(old - rollout.reference, rollout)
        advantages = group_advantages.advantages(paid.view(groups.shape), "leave_one_out")
    elif cfg.policy == "grpo":
        advantages = group_advantages.advantages(groups, "group")
    else:  # 1 for the best of each group, and for all where they are equal none
        best = torch.zeros_like(groups).scatter(1, groups.argmax(1, keepdim=True), 1.0)
        advantages = best * group_advantages.spread(groups)[:, None]
    return Prepared(rollout, old, advantages.flatten(), None)


def loss_of(
    cfg: Config, beta: float, p: Prepared, logprobs: Tensor, values: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """(loss with gradients, metrics) of log π and V (n,) as they are now."""
    if p.experience is not None:
        assert values is not None
        found = ppo_lm.losses(logprobs, values, p.experience, clip=cfg.clip_ratio, value_clip=cfg.value_clip or None)
        return found.policy + found.value, {
            "value_loss": found.value.item(), "clip_fraction": found.clip_fraction,
            "approximate_kl": found.approximate_kl, "explained_variance": explained(p.experience),
        }  # fmt: skip
    owner, count, tokens = p.rollout.owner, len(p.rollout.scores), len(logprobs)
    if cfg.policy == "best_of_n":
        weights = p.advantages[owner]
        return -(weights * logprobs).sum() / weights.sum().clamp(min=1), {}
    settings = policy_loss.Settings(clip_low=cfg.clip_ratio, clip_high=cfg.clip_ratio, mean="dr_grpo")
    if cfg.policy == "grpo":
        settings = policy_loss.Settings(clip_low=cfg.clip_ratio, clip_high=cfg.clip_ratio, kl_weight=beta)
    answers = policy_loss.Answers(logprobs, p.old, owner, p.advantages, reference=p.rollout.reference)
    parts = policy_loss.policy_loss(answers, policy_loss.Totals(count, tokens, cfg.new_tokens), settings)
    return parts.loss, {"clip_fraction": parts.clipped / tokens, "approximate_kl": parts.approximate_kl / tokens}


def sums(values: Tensor, rollout: Rollout) -> Tensor:
    """(n,) → (N,): sums over the tokens of each answer."""
    return torch.zeros_like(rollout.scores).index_add(0, rollout.owner, values.to(rollout.scores.dtype))


def explained(e: ppo_lm.Experience) -> float:
    """1 − Var(G − V) / Var(G): the share of the returns' variance that the values knew. At least −10 is shown."""
    spread = e.targets.var().item()
    return max(-10.0, 1 - (e.targets - e.values).var().item() / spread) if spread > 0 else 0.0


# --- The loop


@dataclass
class Stage:
    """What stage 3 works with."""

    cfg: Config
    model: Llama
    tokenizer: Tokenizer
    reward: RewardModel
    value: ValueModel
    proxy: Scale  # of the reward model's rewards
    gold: Score | None
    asked: list[Prompt]  # held-out ones, which the models of all stages are asked

    def values(self, batch: Batch) -> Tensor:
        """(n,): on the scale of the proxy, as the value network begins as the reward model."""
        wear(self.model, "value")
        return self.proxy(self.value(batch))


def train(stage: Stage, run: Run, prompts: Sequence[Prompt], steps: int, phase: str = MAIN) -> list[str]:
    """The loop; returns what the policy answered to the held-out prompts half-way."""
    cfg, model = stage.cfg, stage.model
    named = [*model.named_parameters(), *stage.value.head.named_parameters("head")]
    trained = {name: p for name, p in named if p.requires_grad}
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), 0.0), lr=cfg.lr)
    kept: dict[str, Any] = {"beta": cfg.beta, "midway": "[]"}
    for step in run.steps(steps, {"trained": trained, "optimizer": optimizer, "kept": kept}, phase):
        # Answers of the policy as it is, to prompts that are a function of (seed, step).
        chosen = packing.batch_indices(
            len(prompts), cfg.batch // cfg.group, step, lambda epoch: run.generator(phase, "prompts", epoch)
        )
        wear(model, "policy")
        asked, luck = [prompts[i] for i in chosen], run.generator(phase, "answers", step)
        answers = data.ask(cfg, model, stage.tokenizer, asked, cfg.group, luck)
        rollout, batch, seen = roll(stage, answers)

        # Several passes over the same answers. The first one's log-probabilities are those of the old policy.
        beta, prepared = kept["beta"], None
        for _ in range(cfg.passes):
            values = stage.values(batch) if cfg.policy == "ppo" else None
            wear(model, "policy")
            current = logprobs.token_logprobs(model, batch, cfg.temperature)
            prepared = prepared or prepare(cfg, beta, rollout, current, values)
            loss, metrics = loss_of(cfg, beta, prepared, current, values)
            loss.backward()
            norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
            lr = optim.cosine(step, steps, cfg.warmup, cfg.lr, cfg.lr / 10) if phase == MAIN else cfg.lr
            optimizer.step(lr=lr)
            optimizer.zero_grad()
        assert prepared is not None
        distance = sums(prepared.old - rollout.reference, rollout).mean().item()  # E[log π − log π_ref]: unbiased
        if cfg.kl_target:
            controller = kl.AdaptiveCoefficient(beta, cfg.kl_target, cfg.kl_horizon)
            controller.update(distance, len(answers))
            kept["beta"] = controller.value
        run.log(step, **seen, kl=distance, loss=loss, **metrics, grad_norm=norm, beta=beta, lr=lr)
        if phase == MAIN and 2 * (step + 1) >= steps > 1 and kept["midway"] == "[]":
            wear(model, "policy")
            some = stage.asked[: cfg.batch]
            found = data.ask(cfg, model, stage.tokenizer, some, 1, run.generator("samples"))
            kept["midway"] = json.dumps([answer.text for answer in found])
    return json.loads(kept["midway"])  # type: ignore[no-any-return]


@torch.no_grad()
def roll(stage: Stage, answers: Sequence[Answer]) -> tuple[Rollout, Batch, dict[str, float]]:
    """Scores and the reference's log-probabilities of the answers of a step, and its metrics."""
    cfg, batch = stage.cfg, packing.collate([a.document() for a in answers])
    proxy = stage.proxy(reward.scores(stage.reward, [a.document() for a in answers], cfg.caution))
    gold = torch.tensor(data.judged(stage.gold, answers)) if stage.gold else None
    lengths = logprobs.lengths(batch)
    judged = gold if cfg.reward == "gold" and gold is not None else proxy
    scores = score(cfg, judged, lengths, torch.tensor([a.ended for a in answers]))
    wear(stage.model, "sft")
    reference = logprobs.token_logprobs(stage.model, batch, cfg.temperature)
    seen = {"proxy": proxy.mean().item(), "score": scores.mean().item(), "length": lengths.double().mean().item()}
    if gold is not None:
        seen["gold"] = gold.mean().item()
    return Rollout(logprobs.owners(batch), reference, scores, cfg.group), batch, seen


# --- What a policy has become


@dataclass(frozen=True)
class Taste:
    """Sampled answers, their rewards (proxy on its scale; gold, none without one), log π − log π_ref of each."""

    answers: list[Answer]
    proxy: list[float]
    gold: list[float]
    kls: list[float]

    def means(self) -> dict[str, float]:
        found = {"proxy": sum(self.proxy) / len(self.proxy), "kl": sum(self.kls) / len(self.kls)}
        found["distinct_2"] = samples.distinct([answer.text for answer in self.answers])
        return found | ({"gold": sum(self.gold) / len(self.gold)} if self.gold else {})


@torch.no_grad()
def taste(stage: Stage, run: Run, name: str) -> Taste:
    """Answers of the policy of a stage to the same prompts by the same random numbers each time, so that what differs
    is the policy."""
    cfg, model = stage.cfg, stage.model
    wear(model, name)
    answers = data.ask(cfg, model, stage.tokenizer, stage.asked, 1, run.generator("samples"))
    kls: list[float] = []
    for part in logprobs.chunks([a.document() for a in answers], 2048):
        batch = packing.collate(part)
        both = []
        for which in (name, "sft"):
            wear(model, which)
            both.append(logprobs.sequence_sums(logprobs.token_logprobs(model, batch, cfg.temperature), batch))
        kls += (both[0] - both[1]).tolist()
    raw = reward.scores(stage.reward, [a.document() for a in answers], cfg.caution)
    return Taste(answers, stage.proxy(raw).tolist(), data.judged(stage.gold, answers) if stage.gold else [], kls)
