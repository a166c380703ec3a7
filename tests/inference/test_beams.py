"""Beam search against transformers, and answers that share their prompt's blocks."""

import pytest
import torch
from small_served import llama, prompts

from finetune.errors import UserError
from finetune.inference.beams import BeamSearch, samples
from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.lm.io import load

LIMITS = (
    {"blocks": 300},
    {"blocks": 20, "block_size": 4},
    {"blocks": 300, "most_sequences": 2},
    {"blocks": 99, "most_tokens": 3},
)


@pytest.mark.timeout(60)
@pytest.mark.peer
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
def test_beams_are_those_of_transformers(tmp_path, penalty):
    import transformers

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    model, early = load.llama(tmp_path).eval(), 0
    for width in (1, 3):
        for stops in ([3], [3, 4]):
            asked = [[token % 20 for token in prompt] for prompt in prompts(6)]
            best: dict[int, list] = {}
            for i, limits in enumerate(LIMITS):
                engine = Engine(model, **limits)
                found = [BeamSearch(engine, prompt, width, 12, stops, penalty) for prompt in asked]
                engine.run()
                assert (engine.pool.used, engine.busy) == (0, False)
                best[i] = [search.best for search in found]
            assert best[0] == best[1] == best[2] == best[3]
            for prompt, mine in zip(asked, best[0], strict=True):
                ids = torch.tensor([prompt])
                wanted = theirs.generate(
                        ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width,
                        max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=0, length_penalty=penalty,
                    )  # fmt: skip
                texts = [row[len(prompt) :].tolist() for row in wanted]
                ends = [next((i + 1 for i, token in enumerate(row) if token in stops), 12) for row in texts]
                rows = [row[:end] for row, end in zip(texts, ends, strict=True)]
                assert mine == rows
                early += len(rows[0]) < 12
    assert early > 5


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_parallel_samples_share_the_prompt_and_are_what_they_are_alone(limits):
    model, prompt, how = llama(), [*range(30)], Sampling(temperature=1.0, seed=5)
    alone = []
    for i in range(4):
        engine = Engine(model, blocks=30)
        one = engine.add(prompt, Sampling(temperature=1.0, seed=5 + i), 10)
        engine.run()
        alone.append(one.answer)
    engine = Engine(model, **limits)
    found = samples(engine, prompt, how, 10, 4)
    engine.run()
    assert [one.answer for one in found] == alone
    assert len({tuple(answer) for answer in alone}) > 1
    assert engine.pool.used == 0
    if limits == LIMITS[0]:
        assert engine.scheduler.misses == len(prompt)  # computed once


def test_samples_use_fewer_blocks_than_separate_requests():
    most = {}
    for shared in (True, False):
        engine = Engine(llama(), blocks=100, block_size=4, prefix_cache=False)
        how = Sampling(temperature=1.0)
        if shared:
            samples(engine, [*range(40)], how, 4, 8)
        else:
            for _ in range(8):
                engine.add([*range(40)], how, 4)
        used = []
        while engine.busy:
            engine.step()
            used.append(engine.pool.used)
        most[shared] = max(used)
    assert (most[True], most[False]) == (10 + 8, 80 + 8)


def test_a_beam_search_without_beams_is_refused():
    with pytest.raises(UserError, match="at least one beam"):
        BeamSearch(Engine(llama(), blocks=10), [1], 0, 5)
