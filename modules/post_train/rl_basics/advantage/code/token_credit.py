"""Credit by token: the advantages of a tiny language model's tokens, exact over all answers, by eight estimators.

A state is the prompt and the tokens so far, an action the next token; transitions are deterministic. Token 0 ends the
answer. The score is a reward at the last token, −β (log π − log π_ref) one at each token. A 1 as the second token and a
2 as the last but one score a point each; every other token can only end the answer too early.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from finetune import ops
from finetune.rl.advantages import group_normalized, last_token, leave_one_out, returns_to_go, token_rewards
from finetune.rl.envs.rollout import numpy_generator
from finetune.runs.display import uncertain
from finetune.runs.run import Run

from . import plots

VOCABULARY = 3
GROUP, GROUPS = 8, 512
ESTIMATORS = ("td", "gae", "mc", "td_rough", "gae_rough", "discounted", "leave_one_out", "group_normalized")


@dataclass
class Answers:
    """All N possible answers of at most T tokens; (T, N) unless stated otherwise, 0 behind the end."""

    tokens: Tensor
    mask: Tensor  # bool: up to and including the end
    node: Tensor  # number of the pair (tokens so far, token)
    rewards: Tensor
    last: Tensor  # bool
    values: Tensor  # V^π of the tokens so far
    advantages: Tensor  # A^π of the token
    chance: Tensor  # (N,) probability of the answer


def answers(length: int, beta: float, rng: np.random.Generator) -> Answers:
    """Policy and reference model are random tables over (tokens so far, next token)."""
    tokens = np.array([a for a in product(range(VOCABULARY), repeat=length) if _padded(a)]).T  # (T, N)
    T, N = tokens.shape
    mask = np.concatenate([np.ones((1, N), bool), tokens[:-1] != 0])
    prefix = np.zeros((T, N), int)  # number of the tokens so far among those of their length
    for t in range(1, T):
        prefix[t] = prefix[t - 1] * VOCABULARY + tokens[t - 1]
    log_policy, log_reference = (np.empty((T, N)) for _ in range(2))
    for t in range(T):
        for table in (log_policy, log_reference):
            logits = rng.standard_normal((VOCABULARY**t, VOCABULARY)) - [1.0, 0.0, 0.0]  # ends are rarer
            table[t] = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[prefix[t], tokens[t]]
    score = (tokens[1] == 1) * 1.0 + (tokens[-2] == 2)
    scores, log_probs, log_references, masks = map(torch.from_numpy, (score, log_policy, log_reference, mask))
    last = last_token(masks)
    rewards = token_rewards(scores, log_probs, log_references, last, beta).masked_fill(~masks, 0.0)
    chance = np.exp((log_policy * mask).sum(0))
    node = np.stack([VOCABULARY ** (t + 1) + prefix[t] * VOCABULARY + tokens[t] for t in range(T)])  # lengths apart
    # V of a prefix: the mean reward-to-go of the answers that begin with it, at γ = 1.
    to_go = rewards.numpy()[::-1].cumsum(0)[::-1]
    parent = node // VOCABULARY
    Q, V = (conditional_mean(torch.from_numpy(to_go.copy()), torch.from_numpy(x), masks, torch.from_numpy(chance))
            for x in (node, parent))  # fmt: skip
    return Answers(torch.from_numpy(tokens), masks, torch.from_numpy(node), rewards, last, V, Q - V,
                   torch.from_numpy(chance))  # fmt: skip


def conditional_mean(x: Tensor, node: Tensor, mask: Tensor, chance: Tensor) -> Tensor:
    """(T, N): the mean of x over all answers through the same node, weighted by probability; 0 where masked."""
    weights = chance * mask
    sums, total = (
        torch.zeros(int(node.max()) + 1, dtype=torch.float64).index_add_(0, node.flatten(), y.flatten())
        for y in (weights * x, weights)
    )
    return (sums / total.clamp(min=1e-300))[node].masked_fill(~mask, 0.0)


def _padded(answer: tuple[int, ...]) -> bool:
    """Nothing but 0 behind the first 0."""
    return 0 not in answer or not any(answer[answer.index(0) :])


def rough(found: Answers) -> Tensor:
    """(T, N) values of a rough critic, which knows the number of tokens so far but not the tokens: the mean of V^π."""
    place = torch.arange(len(found.tokens))[:, None].expand_as(found.tokens)
    return conditional_mean(found.values, place, found.mask, found.chance)


def estimates(found: Answers, lam: float, gamma: float) -> dict[str, Tensor]:
    """Advantages (T, N) of every answer. `whole` is the answer's return with its KL, the input of RLOO and GRPO."""
    none = torch.zeros_like(found.last)

    def gae(values: Tensor, lam: float) -> Tensor:
        next_values = torch.cat([values[1:], torch.zeros_like(values[:1])])
        return ops.gae(found.rewards, values, next_values, found.last, none, gamma=1.0, lam=lam)[0]

    roughly = rough(found)
    made = {
        "td": gae(found.values, 0.0),
        "gae": gae(found.values, lam),
        "mc": gae(found.values, 1.0),
        "td_rough": gae(roughly, 0.0),
        "gae_rough": gae(roughly, lam),
        "discounted": returns_to_go(found.rewards, found.last, gamma) - roughly,
        "whole": found.rewards.sum(0).expand_as(found.rewards),
    }
    return {name: x.masked_fill(~found.mask, 0.0) for name, x in made.items()}


def bias_seen(found: Answers, x: Tensor) -> float:
    """The bias of x (T, N) that a gradient sees: the root mean square over tokens of E[x | node] − A^π, minus its mean
    over the tokens that are possible there. A sum over all answers, so exact."""
    off = conditional_mean(x, found.node, found.mask, found.chance) - found.advantages
    off = off - conditional_mean(off, found.node // VOCABULARY, found.mask, found.chance)
    return rms(off, found.mask, found.chance)


def rms(x: Tensor, mask: Tensor, chance: Tensor) -> float:
    weights = mask * chance
    return float(((weights * x**2).sum() / weights.sum()).sqrt())


def rms_error(x: Tensor, mask: Tensor) -> float:
    """Standard error of the root mean square of x (T, GROUPS · GROUP), from the spread over the groups."""
    squares, counts = ((mask * y).sum(0).double().view(GROUPS, GROUP).sum(1) for y in (x**2, torch.ones_like(x)))
    mean = squares.sum() / counts.sum()
    off = (squares - mean * counts).square().sum().sqrt() / counts.sum()
    return float(off / (2 * mean.sqrt())) if mean else 0.0


def report(run: Run, length: int, beta: float, lam: float, gamma: float) -> None:
    """The result is GAE's error with the exact critic, against one number for all tokens (RLOO)."""
    found = answers(length, beta, numpy_generator(run, "answers"))
    every = estimates(found, lam, gamma)
    bias = {name: bias_seen(found, x) for name, x in every.items()}
    bias["leave_one_out"] = bias.pop("whole")  # on average it is that less a constant

    rng = numpy_generator(run, "groups")
    columns = torch.from_numpy(rng.choice(len(found.chance), GROUPS * GROUP, p=found.chance / found.chance.sum()))
    truth, mask = found.advantages[:, columns], found.mask[:, columns]
    drawn = {name: x[:, columns] for name, x in every.items()}
    grouped = drawn.pop("whole")[0].view(GROUPS, GROUP)
    drawn |= {f.__name__: f(grouped).flatten() * mask for f in (leave_one_out, group_normalized)}
    alone = torch.ones(len(columns), dtype=torch.float64)
    error = {name: rms(drawn[name] - truth, mask, alone) for name in ESTIMATORS}
    around = {name: rms_error(drawn[name] - truth, mask) for name in ESTIMATORS}
    close = 1e-8 * max(1.0, float(found.rewards.abs().max()))
    run.check("token_error_td", error["td"], at_most=close)  # the next state is certain
    run.result("token_error_gae", error["gae"], error=around["gae"], baseline=error["leave_one_out"], higher=False)
    unbiased = max(bias[name] for name in ("td", "gae", "mc", "leave_one_out"))
    run.check("token_bias", unbiased, at_most=close)
    run.check("token_bias_discounted", bias["discounted"])
    run.table(
        "credit by token: root mean square error against the exact A^π, and the bias that a gradient sees",
        [
            {
                "estimator": n,
                "error ± s.e.": uncertain(error[n], around[n]),
                "bias": f"{bias[n]:.1e}" if n in bias else "–",
            }
            for n in ESTIMATORS
        ],
    )
    by_place = {n: [rms((drawn[n] - truth)[t], mask[t], alone) for t in range(length)] for n in ESTIMATORS}
    shown = int((mask.all(0) & (drawn["leave_one_out"][0] > 0)).int().argmax())
    names = [str(int(token)) for token in found.tokens[:, columns[shown]]]
    one = {n: drawn[n][:, shown].numpy() for n in ESTIMATORS}
    plots.token_credit(run, names, truth[:, shown].numpy(), one, by_place)
