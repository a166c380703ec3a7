"""The engine against transformers and against each request alone: under load, preempted, from the prefix cache."""

import random
from contextlib import nullcontext

import pytest
import torch
from small_served import llama, prompts, wide
from small_server import TEXT, trained_tokenizer

from finetune.errors import UserError
from finetune.inference.blocks import BlockPool
from finetune.inference.cache import PagedCache, PagedStep
from finetune.inference.engine import Engine
from finetune.inference.generate import generate
from finetune.inference.sampler import Sampling
from finetune.inference.speculative import PromptLookup
from finetune.inference.text import TextStream
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io import load
from finetune.ops import use_backend

LIMITS = (
    {"blocks": 200},
    {"blocks": 15, "block_size": 4},  # preempts
    {"blocks": 40, "block_size": 3, "most_tokens": 7},  # prompts in parts
    {"blocks": 60, "block_size": 1, "most_tokens": 1},
    {"blocks": 30, "block_size": 4, "most_sequences": 2, "prefix_cache": False},
)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
def test_every_answer_is_the_one_it_gets_alone(limits, how):
    model = llama()
    alone = []
    for prompt in prompts():
        engine = Engine(model, blocks=20)
        sequence = engine.add(prompt, how, 20)
        engine.run()
        alone.append(sequence.answer)
    if not how.temperature:
        assert alone == [generate(model, [prompt], 20)[0] for prompt in prompts()]
    engine, arrivals = Engine(model, **limits), random.Random(1)
    waiting, sequences = prompts(), []
    while waiting or engine.busy:
        if waiting and arrivals.random() < 0.5:
            sequences.append(engine.add(waiting.pop(0), how, 20))
        engine.step()
    assert [one.answer for one in sequences] == alone
    assert (engine.pool.used, set(engine.pool.references)) == (0, {0})
    assert engine.scheduler.preemptions > 0 or limits != LIMITS[1]


@pytest.mark.parametrize("drafter", [None, PromptLookup(3, 2)], ids=["plain", "guessing"])
def test_forty_prompts_at_random_in_a_small_pool_get_the_texts_they_get_alone(drafter):
    """Greedy and sampled, with stop strings, stop tokens, log-probabilities and priorities, preempted again and again;
    after the drain no block is held and nothing is counted."""
    tokenizer = trained_tokenizer()
    model, rng = llama(vocab_size=tokenizer.vocab_size), random.Random(2)
    words, asked = TEXT.split(), []
    for i in range(40):
        prompt = tokenizer.encode("the quick " * (i % 3 == 0) + " ".join(rng.choices(words, k=rng.randrange(1, 9))))
        how = Sampling(temperature=rng.choice((0, 0.9)), top_p=0.9, seed=i, logprobs=rng.choice((None, 1)))
        stops = [rng.choice("abcdefghij") for _ in range(rng.randrange(3))]
        asked.append((prompt, how, rng.randrange(1, 25), stops, rng.randrange(3)))

    def add(engine, i):
        prompt, how, most_new, stops, priority = asked[i]
        text = TextStream(tokenizer, stops)
        return engine.add(prompt, how, most_new, [tokenizer.eos_id, 7], priority, text)

    def result(one):
        return one.text.text, one.finish_reason, one.answer, len(one.logprobs)

    alone = []
    for i in range(40):
        engine = Engine(model, blocks=30, block_size=4)
        alone.append(add(engine, i))
        engine.run()
    engine, found = Engine(model, blocks=22, block_size=4, most_tokens=16, drafter=drafter), []
    while len(found) < 40 or engine.busy:
        while len(found) < 40 and rng.random() < 0.4:
            found.append(add(engine, len(found)))
        engine.step()
    assert [result(one) for one in found] == [result(one) for one in alone]
    assert {one.finish_reason for one in found} == {"stop", "length"}
    assert len({one.text.text for one in found}) > 20
    assert engine.scheduler.preemptions >= 10
    assert (engine.pool.used, set(engine.pool.references), len(engine.pool.free)) == (0, {0}, 22)
    assert (engine.scheduler.waiting, engine.scheduler.running) == ([], [])
    assert all((one.table.blocks, one.table.tokens) == ([], 0) for one in found)


def test_a_known_prefix_is_not_computed_again():
    model, prompt = llama(), [*range(50)]
    engine = Engine(model, blocks=40, block_size=8)
    answers = []
    for extra in (1, 2, 3):
        sequence = engine.add([*prompt, extra], Sampling(), 4)
        engine.run()
        answers.append(sequence.answer)
    assert (engine.scheduler.hits, engine.scheduler.misses) == (2 * 48, 3 * 51 - 2 * 48)
    assert answers == [generate(model, [[*prompt, extra]], 4)[0] for extra in (1, 2, 3)]


@pytest.mark.parametrize("limits", LIMITS[:3], ids=str)
def test_gpt_is_served_too(limits):
    model = wide(GPT(GPTConfig(vocab_size=100, dim=32, layers=2, heads=4, max_length=128)))
    engine = Engine(model, **limits)
    sequences = [engine.add(prompt, Sampling(), 20) for prompt in prompts()]
    engine.run()
    assert [one.answer for one in sequences] == [generate(model, [prompt], 20)[0] for prompt in prompts()]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_cache_of_8_bits_is_smaller_and_close(dtype):
    model = llama()
    plain, small = Engine(model, blocks=64), Engine(model, blocks=64, cache_dtype=dtype)
    assert small.cache.nbytes == plain.cache.nbytes * (8 + 4) / (8 * 4)  # D = 8: 8 bytes and a scale, for 8 fp32
    same = 0
    for prompt in prompts():
        first, second = (engine.add(prompt, Sampling(), 1) for engine in (plain, small))
        plain.run(), small.run()
        same += first.answer == second.answer
    assert same >= len(prompts()) - 2


def test_blocks_are_copied_one_pair_after_the_other():
    """Block 0 goes to 1, and is then overwritten by 2."""
    cache = PagedCache(llama(), BlockPool(4, 2))
    for layer in cache.layers:
        for blocks, _ in layer:
            blocks[:] = torch.arange(4.0)[:, None, None, None]
    cache.copy([(0, 1), (2, 0)])
    assert all(blocks[:, 0, 0, 0].tolist() == [2, 0, 2, 3] for layer in cache.layers for blocks, _ in layer)


@torch.no_grad()
def test_attention_asks_once_and_obeys_a_forced_backend():
    model, found = llama(), []
    for backend, asked in ((None, True), ("cpp", True), ("reference", False)):
        engine = Engine(model, blocks=20)
        engine.add([*range(30)], Sampling(), 1)
        plan = engine.scheduler.plan()
        view = PagedStep(engine.cache, plan)
        with use_backend(backend) if backend else nullcontext():
            found.append(model(torch.tensor([plan[0].tokens]), positions=view.positions, cache=view))
        assert view.direct is asked
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().max() < 1e-4 * found[2].abs().max()


def test_an_answer_ends_at_a_stop_token():
    model = llama()
    whole = generate(model, [[1, 2, 3]], 20)[0]
    engine = Engine(model, blocks=20)
    sequence = engine.add([1, 2, 3], Sampling(), 20, stop_ids=[whole[5]])
    engine.run()
    assert sequence.answer == whole[: whole.index(whole[5]) + 1]


def test_what_can_never_fit_is_refused():
    engine = Engine(llama(), blocks=4, block_size=4)
    for prompt, most_new, what in (([], 1, "empty"), ([100], 1, "vocabulary"), ([1] * 10, 7, "cache of 16"),
                                   ([1] * 100, 100, "maximum length of 128")):  # fmt: skip
        with pytest.raises(UserError, match=what):
            engine.add(prompt, Sampling(), most_new)
    assert not engine.busy


FAMILIES = {
    "window": {"window": 5, "window_layers": (0,)},
    "qwen3": {"qk_norm": True, "qkv_bias": True, "head_dim": 16},
    "nope": {"nope_layers": (1,)},
    "gemma3": {
        "norm_plus_one": True, "post_norms": True, "activation": "gelu_tanh", "embedding_scale": 5.0,
        "attention_scale": 0.3, "window": 3, "window_layers": (1,), "local_rope_theta": 100.0,
    },
    "llama3": {"rope_scaling": {"kind": "llama3", "factor": 4.0, "original_length": 32}},
}  # fmt: skip


@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES)
def test_families_are_served(fields):
    model = llama(**fields)
    engine = Engine(model, blocks=25, block_size=4, most_tokens=11)
    sequences = [engine.add(prompt, Sampling(), 20) for prompt in prompts()]
    engine.run()
    assert [one.answer for one in sequences] == [generate(model, [prompt], 20)[0] for prompt in prompts()]


@pytest.mark.peer
def test_greedy_tokens_are_those_of_transformers(tmp_path):
    import transformers

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    engine = Engine(load.llama(tmp_path).eval(), blocks=30, block_size=8)
    sequences = [engine.add(prompt, Sampling(), 64) for prompt in prompts(10)]
    engine.run()
    assert engine.scheduler.preemptions
    for prompt, one in zip(prompts(10), sequences, strict=True):
        ids = torch.tensor([prompt])
        wanted = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert one.answer == wanted[0, len(prompt) :].tolist()


@pytest.mark.long
@pytest.mark.peer
def test_greedy_tokens_of_smollm2_are_those_of_transformers(smollm2_model, smollm2_peer, smollm2_tokenizer):
    """Ten prompts of Python's documentation × 64 tokens in fp32, preempted, from the cache and guessed: transformers
    gives each token the largest logit after those before it, which is its greedy decoding."""
    questions = [f"Explain {what} in Python." for what in ("lists", "the GIL", "decorators", "slots", "generators",
                 "async", "imports", "descriptors", "f-strings", "exceptions")]  # fmt: skip
    asked = [
        smollm2_tokenizer.encode(smollm2_tokenizer.render_text(
            [{"role": "user", "content": question}], add_generation_prompt=True)[0], add_special_tokens=False)
        for question in questions
    ]  # fmt: skip
    engine = Engine(smollm2_model.eval(), blocks=48, block_size=16, drafter=PromptLookup(4, 3))
    found = [engine.add(prompt, Sampling(), 64) for prompt in asked]
    engine.run()
    assert engine.scheduler.preemptions
    assert engine.scheduler.hits
    assert engine.accepted
    for prompt, one in zip(asked, found, strict=True):
        with torch.no_grad():
            logits = smollm2_peer(torch.tensor([prompt + one.answer])).logits[0, len(prompt) - 1 : -1]
        assert one.answer == logits.argmax(-1).tolist()
