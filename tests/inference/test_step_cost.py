"""What a step costs in Python, counted: not more for a longer context, and less than b times for b rows."""

import sys
import tracemalloc

import pytest
from small_served import llama

from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.inference.scheduler import Work


def decoding(count, context, model):
    """An engine in which `count` sequences decode, with a model that costs nothing."""
    engine = Engine(model, blocks=count * (context // 16 + 4), most_tokens=1 << 20)
    engine.cache.answers = lambda model, plan, asked, adapters=None: [[7] for _ in plan]
    for i in range(count):
        engine.add([i] + [1] * (context - 1), Sampling(), 40)
    for _ in range(3):
        engine.step()
    return engine


def calls(engine):
    """Functions that a step calls, Python's and C's."""
    found = []
    sys.setprofile(lambda frame, event, what: found.append(event) if event in ("call", "c_call") else None)
    try:
        engine.step()
    finally:
        sys.setprofile(None)
    return len(found)


@pytest.fixture(scope="module")
def model():
    return llama(max_length=8192)


def test_calls_do_not_grow_with_the_context(model):
    short, long = (calls(decoding(1, context, model)) for context in (32, 4000))
    assert short == long
    assert short < 150


def test_calls_grow_less_than_the_batch(model):
    one, eight = (calls(decoding(count, 64, model)) for count in (1, 8))
    assert eight < 6 * one


def test_no_list_of_all_tokens_is_made(model):
    engine = decoding(1, 4000, model)  # whose tokens would be a list of 32 KB
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        engine.step()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most - before < 8000
    work = engine.scheduler.plan()[0]
    assert work.tokens == work.sequence.tokens[work.start :]


def test_a_works_tokens_are_those_of_prompt_answer_and_guesses(model):
    engine = decoding(1, 10, model)
    sequence = engine.scheduler.running[0]
    sequence.guesses = [91, 92, 93]
    everything = sequence.tokens + sequence.guesses
    for start in range(len(sequence.tokens)):
        for end in range(start, len(everything) + 1):
            assert Work(sequence, start, end - start, []).tokens == everything[start:end]
