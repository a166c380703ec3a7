"""Rollouts: prompts → groups of sampled answers, with the log-probabilities that sampler and trainer give them.

    sampler = Sampler(policy, "bf16")                        the policy as the engine runs it
    sampler.refresh()                                        after each update of the policy
    groups = rollouts(sampler, tokenizer, prompts, samples=16, most_new=64, stop_ids=stops, generator=g)
    old = trainer_logprobs(policy, groups)                   (n,) of all answers' tokens, one behind the other
    mismatch(old, sampled_logprobs(groups))

The sampler's weights are rounded to a format that multiplies fast, and so its log-probabilities are not quite the
trainer's: by rounding in fp32, by more in bf16 and int8. Answers then come from a policy a little off the one that is
trained, which a truncated importance weight corrects (policy_loss.py; Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finetune.alignment import logprobs
from finetune.alignment.shared_prompts import Group, Layout, token_logprobs
from finetune.errors import UserError
from finetune.inference import beams, scheduler
from finetune.inference.engine import Engine, check_prompt
from finetune.inference.packed import WHOLE, Slabs, named, place, place_ends
from finetune.inference.sampler import Sampling
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer, answer_text
from finetune.ops.quantized_linear import FORMATS, QuantizedWeight
from finetune.peft import lora

BLOCK = 16  # tokens of a cache block
MOST_SEQUENCES = 256  # that are sampled at once
MOST_TOKENS = 4096  # of one forward pass of the trainer


@dataclass(frozen=True)
class Prompt:
    """A prompt as people and rewards read it, its tokens, and what its row holds for the reward."""

    text: str
    ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class Rollout:
    """A prompt and its sampled answers. An answer's tokens end with the one that ended it, if one did: losses, KL and
    metrics count these tokens and no others."""

    prompt: list[int]
    answers: list[list[int]]
    sampled: list[Tensor]  # (n,) fp32 of each answer: log-probability that the sampler drew each token with
    finished: list[bool]  # whether a stop token came, not the limit
    texts: list[str]  # without the stop token

    @property
    def group(self) -> Group:
        return Group(self.prompt, self.answers)


class Sampler:
    """The policy as the engine runs it: a copy with packed weights, in which its adapters are merged. Norms and biases
    are the policy's own.

    format: of ops.quantized_linear's FORMATS; None: no copy, the policy's own modules. Costs the bytes of the format,
    and at each `refresh` the time to pack the layers that training changes. UserError for an unknown format.

    A weight in bf16 and an adapter are summed in fp32. Rounded to the nearest bf16 number the sum would be the weight
    again, as long as the adapter adds less than half of the distance between two numbers: the sampler would not see the
    first updates at all. So it is rounded up or down with the probabilities that make it right on average.
    """

    def __init__(self, policy: Llama | GPT, format: str | None = "bf16") -> None:
        if format is not None and format not in FORMATS:
            raise UserError(f"answers are not sampled with weights in {format!r} (only {', '.join(FORMATS)})")
        self.policy, self.model = policy, policy
        self.packed: dict[str, QuantizedWeight] = {}  # of the copy, by the name of the policy's layer
        if format is not None:
            self.copy(format)

    @torch.no_grad()
    def copy(self, format: str) -> None:
        policy, slabs = self.policy, Slabs()
        ends = format if format in WHOLE else "int8"  # of embedding and head, as inference.packed.pack has them
        for name, layer in matrices(policy):
            wanted = ends if name in ("embed", "head") else format
            self.packed[name] = slabs.take(named(name, weight_for(layer, wanted), wanted))
        with torch.device("meta"):
            self.model = Llama(policy.config) if isinstance(policy, Llama) else GPT(policy.config)
        for name, layer in lora.linear_layers(policy).items():
            if name != "head":
                base: Any = layer.base if isinstance(layer, lora.LoRALinear) else layer
                place(self.model, name, self.packed[name], base.bias)
        place_ends(self.model, self.packed["embed"], self.packed.get("head", self.packed["embed"]))
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta:
                owner, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, policy.get_parameter(name))
        self.model.eval()

    @torch.no_grad()
    def refresh(self) -> None:
        """Packs again what training changes. The packed tensors stay where they are."""
        for name, layer in matrices(self.policy) if self.packed else ():
            if any(p.requires_grad for p in layer.parameters()):
                old = self.packed[name]
                new = named(name, weight_for(layer, old.format), old.format).packed(old.device)
                for into, tensor in zip(old.tensors, new.tensors, strict=True):
                    into.copy_(tensor)


def weight_for(layer: Any, format: str) -> Tensor:
    """(out, in): the layer's weight, with adapters in fp32, to be packed in a format; see `Sampler`."""
    if not isinstance(layer, lora.LoRALinear):
        return layer.weight
    return dithered(layer.exact) if format == "bf16" and layer.base.weight.dtype == torch.bfloat16 else layer.exact


def dithered(weight: Tensor) -> Tensor:
    """fp32 → bf16, each number rounded away from 0 with the probability that makes the result right on average. The
    random numbers are the same each time; what bf16 holds exactly stays."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(1 << 16, weight.shape, generator=g, dtype=torch.int32).to(weight.device)
    return ((weight.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def matrices(model: Llama | GPT) -> list[tuple[str, Any]]:
    """(name, layer) of the embedding and of every linear layer, adapted ones as such."""
    return [("embed", model.embed), *lora.linear_layers(model).items()]


def rollouts(
    sampler: Sampler,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    samples: int,
    most_new: int,
    *,
    temperature: float = 1.0,
    stop_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
) -> list[Rollout]:
    """`samples` answers to each prompt, each of at most `most_new` tokens, from softmax(logits / temperature) and
    nothing narrower: with top-k or top-p the answers would not be the policy's. An answer depends on its prompt, the
    generator and its place only. UserError for a prompt that is empty or too long, and for a temperature of 0."""
    if temperature <= 0 or samples < 1 or most_new < 1:
        raise UserError("rollouts need a temperature above 0, and at least one sample of at least one token")
    model, stops = sampler.model, frozenset(stop_ids)
    for i, prompt in enumerate(prompts):
        check_prompt(model, prompt, most_new, None, f"prompt {i}")
    seeds = torch.randint((1 << 62) - 1, (len(prompts),), generator=generator).tolist()
    training = model.training
    model.eval()
    found: list[Rollout] = []
    size = max(1, MOST_SEQUENCES // samples)
    for start in range(0, len(prompts), size):
        some = prompts[start : start + size]
        blocks = sum(len(p) // BLOCK + samples * (-(-(len(p) % BLOCK + most_new) // BLOCK) + 1) for p in some)
        count = samples * len(some)
        engine = Engine(model, blocks, BLOCK, most_tokens=max(2048, count), most_sequences=count, prefix_cache=False)
        groups = [
            beams.samples(engine, prompt, Sampling(temperature, seed=seed), most_new, samples, stops)
            for prompt, seed in zip(some, seeds[start : start + size], strict=True)
        ]
        engine.run()
        found += [grouped(tokenizer, group, stops) for group in groups]
    model.train(training)
    return found


def grouped(tokenizer: Tokenizer, group: Sequence[scheduler.Sequence], stops: frozenset[int]) -> Rollout:
    """The finished sequences of one prompt as a rollout."""
    answers = [one.answer for one in group]
    return Rollout(
        group[0].prompt,
        answers,
        [torch.tensor(one.drawn) for one in group],
        [one.finish_reason == "stop" for one in group],
        [answer_text(tokenizer, answer, stops) for answer in answers],
    )


# --- What sampler and trainer say about the same tokens


def sampled_logprobs(groups: Sequence[Rollout]) -> Tensor:
    """(n,) fp32: the sampler's, of all tokens of all answers in order."""
    return torch.cat([torch.zeros(0), *(one for group in groups for one in group.sampled)])


@torch.no_grad()
def trainer_logprobs(model: Llama | GPT, groups: Sequence[Rollout], temperature: float = 1.0) -> Tensor:
    """(n,) fp32: the model's without dropout, of the same tokens in the same order."""
    with logprobs.evaluated(model):
        parts = [token_logprobs(model, Layout(part), temperature)[0] for part in chunks(groups)]
    return torch.cat([torch.zeros(0), *(part.cpu() for part in parts)])


def chunks(groups: Sequence[Rollout], most: int = MOST_TOKENS) -> Iterator[list[Group]]:
    """Groups whose rows have at most `most` tokens, or one answer that has more; a group may be cut between two
    answers."""
    parts: list[tuple[list[int], list[list[int]]]] = []
    size = 0
    for rollout in groups:
        for answer in rollout.answers:
            known = bool(parts) and parts[-1][0] is rollout.prompt
            cost = len(answer) + (0 if known else len(rollout.prompt))
            if parts and size + cost > most:
                yield [Group(*part) for part in parts]
                parts, size, known, cost = [], 0, False, len(answer) + len(rollout.prompt)
            if known:
                parts[-1][1].append(answer)
            else:
                parts.append((rollout.prompt, [answer]))
            size += cost
    if parts:
        yield [Group(*part) for part in parts]


def mismatch(old: Tensor, sampled: Tensor) -> dict[str, float]:
    """How far the sampler is from the trainer on the tokens that it drew, (n,) log-probabilities each: mean and largest
    |log π_old − log π_sampler|, and the k3 estimate of KL(π_sampler ‖ π_old), nats a token. No tokens: zeros."""
    if not len(old):
        return {"sampler_gap": 0.0, "sampler_gap_max": 0.0, "sampler_kl": 0.0}
    d = (old - sampled).double()
    k3 = (d.exp() - 1 - d).mean().item()
    return {"sampler_gap": d.abs().mean().item(), "sampler_gap_max": d.abs().max().item(), "sampler_kl": k3}
