"""Trained prompts and prefixes served by the engine: the tokens that their own forward pass gives, in any company."""

import pytest
import torch
from small_served import adapter, llama, prompts

from finetune.errors import UserError
from finetune.inference.beams import BeamSearch, samples
from finetune.inference.engine import Engine
from finetune.inference.generate import generate
from finetune.inference.packed import pack
from finetune.inference.sampler import Sampling
from finetune.inference.speculative import PromptLookup
from finetune.inference.virtual_tokens import Virtual
from finetune.lm.gpt import GPT, GPTConfig
from finetune.peft.adapters import save_prompt
from finetune.peft.virtual_tokens import Prefix, Prompt

kinds = pytest.mark.parametrize("kind", [Prompt, Prefix])


def trained(kind, model, count=21, seed=0):
    """Vectors that are those of no tokens."""
    part = kind.from_tokens(model, torch.arange(count))
    g = torch.Generator().manual_seed(seed)
    part.vectors.data += part.vectors.std() * torch.randn(part.vectors.shape, generator=g)
    return part


@torch.no_grad()
def recomputed(model, part, prompt, steps):
    """Greedy, by the part's own forward pass and without a cache: the definition."""
    row = list(prompt)
    for _ in range(steps):
        row.append(int(part(model, torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


@kinds
def test_answers_are_those_of_the_part(kind):
    model = llama()
    part, others = trained(kind, model), trained(kind, model, 5, seed=1)
    wanted = [recomputed(model, part, prompt, 10) for prompt in prompts(6)]
    assert generate(model, prompts(6), 10, virtual=part) == wanted
    assert wanted != generate(model, prompts(6), 10)
    # Next to another part and to nothing, in parts of three tokens, preempted.
    engine = Engine(model, blocks=22, block_size=4, most_tokens=3)
    found, company = [], []
    for prompt in prompts(6):
        found.append(engine.add(prompt, Sampling(), 10, virtual=Virtual(model, part)))
        company.append(engine.add(prompt, Sampling(), 10, virtual=Virtual(model, others)))
        company.append(engine.add(prompt, Sampling(), 10))
    engine.run()
    assert [one.answer for one in found] == wanted
    assert [one.answer for one in company[::2]] == [recomputed(model, others, prompt, 10) for prompt in prompts(6)]
    assert [one.answer for one in company[1::2]] == generate(model, prompts(6), 10)
    assert engine.scheduler.preemptions
    assert engine.pool.used == 0


@kinds
def test_the_prefix_cache_knows_their_content(kind):
    """21 virtual tokens and the first three of the prompt fill three blocks of eight."""
    model, prompt = llama(), [5, 6, 7, 8]
    engine, hits = Engine(model, blocks=40, block_size=8), []
    for part in (trained(kind, model), trained(kind, model), trained(kind, model, seed=1), None, trained(kind, model)):
        one = engine.add(prompt, Sampling(), 5, virtual=part and Virtual(model, part))
        engine.run()
        assert one.answer == (recomputed(model, part, prompt, 5) if part else generate(model, [prompt], 5)[0])
        hits.append(engine.scheduler.hits)
    assert hits == [0, 24, 24, 24, 48]


@kinds
def test_samples_beams_and_speculation_have_them_too(kind):
    model, prompt = llama(), prompts(1)[0]
    part, how = trained(kind, model), Sampling(temperature=0.8, seed=3)
    before = Virtual(model, part)
    engine = Engine(model, blocks=100, block_size=4)
    some = samples(engine, prompt, how, 8, 3, virtual=before)
    search = BeamSearch(engine, prompt, 1, 8, virtual=before)
    engine.run()
    for i, one in enumerate(some):
        alone = engine.add(prompt, Sampling(temperature=0.8, seed=3 + i), 8, virtual=before)
        engine.run()
        assert alone.answer == one.answer
    assert search.best == [recomputed(model, part, prompt, 8)]
    engine = Engine(model, blocks=100, drafter=PromptLookup(4))
    one = engine.add([3, 4, 3, 4, 3], Sampling(), 12, virtual=before)
    engine.run()
    assert one.answer == recomputed(model, part, [3, 4, 3, 4, 3], 12)
    assert engine.proposed


@kinds
def test_a_packed_model_has_them_too(kind):
    """Whatever computes its other tokens."""
    model = llama()
    part = trained(kind, model)
    wanted = generate(model, prompts(4), 10, virtual=part)
    assert generate(pack(model, "fp32", head="fp32"), prompts(4), 10, virtual=part) == wanted


@kinds
def test_a_folder_is_an_adapter_by_name(kind, tmp_path):
    """Next to a LoRA adapter; each in the prefix cache by its content."""
    model = llama()
    part = trained(kind, model)
    save_prompt(model, part, tmp_path / "virtual")
    folders = {"virtual": tmp_path / "virtual", "lora": adapter(tmp_path / "lora")}
    engine = Engine(model, blocks=60, block_size=8, adapters=folders)
    for _ in range(2):
        found = [engine.add([5, 6, 7], Sampling(), 6, adapter=name) for name in ("virtual", "lora", None)]
        engine.run()
        assert found[0].answer == recomputed(model, part, [5, 6, 7], 6)
        assert found[2].answer == generate(model, [[5, 6, 7]], 6)[0]
        assert len({tuple(one.answer) for one in found}) == 3
    assert engine.scheduler.hits == 16
    with pytest.raises(UserError, match="both have virtual tokens"):
        engine.add([5], Sampling(), 6, adapter="virtual", virtual=Virtual(model, part))
    with pytest.raises(UserError, match=r"no adapter 'virtua'.*virtual"):
        engine.add([5], Sampling(), 6, adapter="virtua")


def test_placeholders_are_not_penalized():
    """Virtual tokens are stored as token 0, which is the likeliest here and was never written."""
    model = llama()
    part = trained(Prompt, model)
    likeliest = recomputed(model, part, [4], 1)[0]
    with torch.no_grad():
        model.embed.weight[[0, likeliest]] = model.embed.weight[[likeliest, 0]]
    engine = Engine(model, blocks=20)
    how = (Sampling(), Sampling(repetition_penalty=1e6))
    plain, penalized = (engine.add([4], one, 1, virtual=Virtual(model, part)) for one in how)
    engine.run()
    assert plain.answer == penalized.answer == [0]


def test_what_does_not_fit_is_refused():
    model = llama()
    part = trained(Prefix, model)
    with pytest.raises(UserError, match="prompt 0 has 100 tokens and 21 virtual ones; with 8 new ones it does not fit"):
        generate(model, [[1] * 100], 8, virtual=part)
    with pytest.raises(UserError, match="have 64 numbers each, this model's have 96"):
        Virtual(llama(layers=3), part)
    gpt = GPT(GPTConfig(vocab_size=100, dim=32, layers=2, heads=4, max_length=128))
    with pytest.raises(UserError, match="not a GPT"):
        Virtual(gpt, part)
