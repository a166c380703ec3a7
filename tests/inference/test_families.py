"""Every family that loads, served: transformers' own tokens, in parts, preempted and from the prefix cache."""

import pytest
import torch
from small_families import FAMILIES, family
from small_served import llama

from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.lm.io import save
from finetune.lm.llama import Llama, LlamaConfig

DYNAMIC = {"rope_scaling": {"kind": "dynamic", "factor": 4.0, "original_length": 16}}


def prompts(lengths=(3, 21, 11, 30, 1, 21)):
    """The last begins as the second does, for one block and more."""
    g = torch.Generator().manual_seed(1)
    found = [torch.randint(300, (n,), generator=g).tolist() for n in lengths]
    found[-1][:17] = found[1][:17]
    return found


def served(model, given, **limits):
    engine = Engine(model, **limits)
    sequences = [engine.add(prompt, Sampling(), 20) for prompt in given]
    engine.run()
    assert engine.pool.used == 0
    return [one.answer for one in sequences], engine


def dynamic():
    """Answers, and prompts too, grow beyond the 16 tokens that theta is made for."""
    model = family("llama")
    stretched = Llama(LlamaConfig(**vars(model.config) | DYNAMIC | {"max_length": 64}))
    stretched.load_state_dict(model.state_dict())
    return stretched


@pytest.mark.peer
@pytest.mark.parametrize("case", [*FAMILIES, "dynamic rope"])
def test_tokens_are_those_of_transformers(case, tmp_path):
    import transformers

    model = (dynamic() if case == "dynamic rope" else family(case)).eval()
    save.model(model, tmp_path)
    wanted: list[list[int]] = []
    for prompt in prompts():
        if not wanted or case == "dynamic rope":  # opened again: it remembers the longest sequence
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        ids = torch.tensor([prompt])
        given = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted.append(theirs.generate(ids, attention_mask=torch.ones_like(ids), **given)[0, len(prompt) :].tolist())
    assert len({tuple(answer) for answer in wanted}) == len(wanted)
    assert served(model, prompts(), blocks=100)[0] == wanted
    found, engine = served(model, prompts(), blocks=15, block_size=4, most_tokens=7)
    assert found == wanted
    assert engine.scheduler.preemptions
    engine = Engine(model, blocks=60, block_size=4)
    for prompt, answer in zip([*prompts(), *prompts()], wanted * 2, strict=True):
        one = engine.add(prompt, Sampling(), 20)
        engine.run()
        assert one.answer == answer
    assert engine.scheduler.hits


def test_dynamic_rope_does_not_depend_on_company():
    """Each token is turned by the theta of its own sequence: of its prompt, or of its own position."""
    model = dynamic()
    alone = [served(model, [prompt], blocks=20)[0][0] for prompt in prompts()]
    assert served(model, prompts(), blocks=100)[0] == alone
    assert served(model, prompts()[::-1], blocks=15, block_size=4, most_tokens=7)[0] == alone[::-1]


def test_blocks_of_a_stretched_prompt_are_shared_by_prompts_of_its_length_alone():
    """Of 16 original tokens: below, theta is the same for all."""
    model = llama(**DYNAMIC)
    for lengths, shared in (((12, 14), True), ((20, 20), True), ((20, 24), False), ((14, 20), False)):
        engine = Engine(model, blocks=40, block_size=4)
        for length in lengths:
            sequence = engine.add([*range(8), *[9] * (length - 8)], Sampling(), 2)
            engine.run()
        alone = served(model, [sequence.prompt], blocks=40)[0]
        assert sequence.answer == alone[0][:2]
        assert bool(engine.scheduler.hits) == shared
