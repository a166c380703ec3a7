"""Sampled groups: their tokens, and what the sampler and the trainer say about them."""

import pytest
import torch

from finetune.alignment import rollouts
from finetune.alignment.rollouts import Rollout, Sampler, mismatch, sampled_logprobs, trainer_logprobs
from finetune.alignment.shared_prompts import Layout, token_logprobs
from finetune.errors import UserError
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.peft import lora

PROMPTS = [[5, 9, 3, 7, 1], [8], list(range(20, 60))]


def llama(**fields: object) -> Llama:
    torch.manual_seed(0)
    given: dict = {"vocab_size": 300, "dim": 32, "hidden": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
    return Llama(LlamaConfig(**given | {"max_length": 96} | fields))


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=300, dim=32, layers=2, heads=4, max_length=96))


def adapted(model: Llama, dropout: float = 0.0) -> Llama:
    lora.apply_lora(model, rank=4, alpha=8, dropout=dropout)
    change(model)
    return model


def change(model: Llama) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.05)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words to make a vocabulary of"] * 3, 300)


def sample(sampler: Sampler, tokenizer: Tokenizer, seed: int = 0, **how: object) -> list[Rollout]:
    given: dict = {"samples": 5, "most_new": 12, "temperature": 1.0, "stop_ids": range(0, 300, 11)} | how
    return rollouts.rollouts(sampler, tokenizer, PROMPTS, generator=torch.Generator().manual_seed(seed), **given)


# --- Sampling


def test_an_answer_ends_with_its_stop_token_and_nothing_follows(tokenizer):
    groups = sample(Sampler(llama(), "fp32"), tokenizer)
    assert [len(g.answers) for g in groups] == [5, 5, 5]
    ended = 0
    for group in groups:
        for answer, values, finished in zip(group.answers, group.sampled, group.finished, strict=True):
            stops = [token % 11 == 0 for token in answer]
            assert len(values) == len(answer)
            assert not any(stops[:-1])
            assert stops[-1] == finished
            assert finished or len(answer) == 12
            ended += finished
    assert 0 < ended < 15
    assert len({tuple(a) for g in groups for a in g.answers}) > 12  # samples of a group differ


@pytest.mark.parametrize("make", [lambda: adapted(llama(), 0.3), lambda: llama(tied=False), gpt, llama],
                         ids=["LoRA with dropout", "untied", "gpt", "tied"])  # fmt: skip
@pytest.mark.parametrize("format", [None, "fp32"])
def test_in_fp32_the_sampler_differs_from_the_trainer_by_rounding(make, format, tokenizer):
    model = make().train()
    sampler = Sampler(model, format)
    for _ in range(2):
        groups = sample(sampler, tokenizer, temperature=0.7)
        old = trainer_logprobs(model, groups, 0.7)
        assert len(old) == sum(len(a) for g in groups for a in g.answers) > 50
        assert mismatch(old, sampled_logprobs(groups))["sampler_gap_max"] < 2e-5
        assert mismatch(trainer_logprobs(model, groups, 1.0), sampled_logprobs(groups))["sampler_gap_max"] > 0.1
        assert model.training
        change(model)  # the next answers are those of the changed policy
        sampler.refresh()
    if format:
        change(model)
        groups = sample(sampler, tokenizer, temperature=0.7)
        assert mismatch(trainer_logprobs(model, groups, 0.7), sampled_logprobs(groups))["sampler_gap"] > 1e-3


def test_fewer_bits_differ_by_more_and_the_gap_says_so(tokenizer):
    model = adapted(llama(dim=64, hidden=128))
    gaps = {}
    for format in ("fp32", "bf16", "int8", "int4"):
        groups = sample(Sampler(model, format), tokenizer)
        found = mismatch(trainer_logprobs(model, groups), sampled_logprobs(groups))
        gaps[format] = found["sampler_gap"]
        assert 0 <= found["sampler_kl"] <= found["sampler_gap_max"]
    assert gaps["fp32"] < 1e-5 < gaps["bf16"] < 0.02
    assert gaps["fp32"] < gaps["int8"] < gaps["int4"] < 0.2


def test_a_group_does_not_depend_on_the_others(tokenizer, monkeypatch):
    sampler = Sampler(llama(), "bf16")
    together = sample(sampler, tokenizer)
    monkeypatch.setattr(rollouts, "MOST_SEQUENCES", 5)  # each group alone
    apart = sample(sampler, tokenizer)
    assert [g.answers for g in together] == [g.answers for g in apart]
    assert torch.equal(sampled_logprobs(together), sampled_logprobs(apart))
    assert [g.answers for g in sample(sampler, tokenizer, seed=1)] != [g.answers for g in together]


def test_the_trainers_passes_may_be_cut_anywhere(tokenizer):
    model = llama()
    groups = sample(Sampler(model, None), tokenizer)
    whole = trainer_logprobs(model, groups)
    for most in (1, 50):
        parts = list(rollouts.chunks(groups, most))
        assert len(parts) == 15 if most == 1 else 3 < len(parts) < 15
        assert [a for part in parts for g in part for a in g.answers] == [a for g in groups for a in g.answers]
    cut = [token_logprobs(model, Layout(part))[0] for part in rollouts.chunks(groups, 50)]
    torch.testing.assert_close(torch.cat(cut), whole, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_sampled_is_refused(tokenizer):
    model = llama()
    with pytest.raises(UserError, match="int3"):
        Sampler(model, "int3")
    for wrong in ({"temperature": 0.0}, {"samples": 0}, {"most_new": 0}):
        with pytest.raises(UserError, match="temperature above 0"):
            sample(Sampler(model, None), tokenizer, **wrong)
    with pytest.raises(UserError, match="prompt 2 has 40 tokens"):
        sample(Sampler(model, None), tokenizer, most_new=60)


def test_no_tokens_have_no_gap():
    assert mismatch(torch.zeros(0), torch.zeros(0)) == {"sampler_gap": 0, "sampler_gap_max": 0, "sampler_kl": 0}


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_the_first_updates_of_an_adapter_reach_the_sampler(format):
    """Each changes a weight by far less than the distance between two numbers in bf16, in which the policy is."""
    model = llama().bfloat16()
    lora.apply_lora(model, rank=4, alpha=8)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.fill_(1e-5)
    sampler = Sampler(model, format)
    right = total = swallowed = 0.0
    for name, layer in lora.linear_layers(model).items():
        added = layer.exact.detach() - layer.base.weight
        before = rollouts.named(name, layer.base.weight, format).packed(torch.device("cpu")).dequantize()
        found = sampler.packed[name].dequantize() - before
        right += (found * added).sum().item()
        total += (added * added).sum().item()
        swallowed += ((layer.weight - layer.base.weight).float() * added).sum().item()
    assert swallowed < 0.5 * total
    assert right == pytest.approx(total, rel=0.5)


def test_dithered_is_right_on_average_and_keeps_what_bf16_holds():
    w = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rollouts.dithered(w.bfloat16().float()), w.bfloat16())
    x = torch.full((200, 300), -1.0 - 0.25 * 2**-7)  # a quarter of the way to the next number
    found = rollouts.dithered(x)
    assert sorted(found.unique().tolist()) == [-1 - 2**-7, -1.0]
    assert found.float().mean().item() == pytest.approx(x[0, 0].item(), abs=5 * 2**-7 * 0.43 / 60000**0.5)
