"""The scheduler with a model that is a hash: every sequence gets what it gets alone, whatever the pool, the budget, the
arrivals and the preemptions; and the rules of order one by one."""

import random

import pytest

from finetune.inference.blocks import BlockPool
from finetune.inference.sampler import Sampling
from finetune.inference.scheduler import Scheduler, Sequence


def new(prompt, most_new=4, **given):
    return Sequence(list(prompt), Sampling(), most_new, **given)


class Loop:
    """A server's loop: the cache holds tokens, and the next token is a function of all tokens before it as the cache
    has them, so that a wrong block shows in the answer."""

    def __init__(self, blocks, block_size, **limits):
        self.pool = BlockPool(blocks, block_size)
        self.scheduler = Scheduler(self.pool, **limits)
        self.memory = [None] * (blocks * block_size)
        self.done = []

    def step(self):
        plan, size = self.scheduler.plan(), self.pool.block_size
        for work in plan:
            for source, to in work.copies:
                self.memory[to * size : (to + 1) * size] = self.memory[source * size : (source + 1) * size]
            one = work.sequence
            for i in range(work.start, work.start + work.count):
                self.memory[self.pool.slot(one.table, i)] = one.tokens[i]
            self.pool.publish(one.table, one.tokens[: work.start + work.count])
        for work in plan:
            one = work.sequence
            if not one.left:
                one.answer.append(
                    following([self.memory[self.pool.slot(one.table, i)] for i in range(one.table.tokens)])
                )
                if len(one.answer) == one.most_new:
                    self.scheduler.remove(one)
                    self.done.append(one)
        return plan


def following(tokens):
    return sum((i + 1) * token for i, token in enumerate(tokens)) % 5


def alone(prompt, most_new):
    tokens = list(prompt)
    for _ in range(most_new):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("seed", range(8))
def test_every_answer_is_the_one_it_would_be_alone(seed):
    rng = random.Random(seed)
    loop = Loop(
        rng.choice((8, 16)), rng.choice((2, 4)), most_tokens=rng.choice((1, 5, 64)), most_sequences=rng.choice((2, 8))
    )
    room = loop.pool.count * loop.pool.block_size
    todo = []
    for _ in range(40):
        prompt = [rng.randrange(2) for _ in range(rng.randrange(1, room // 2))]
        todo.append(new(prompt, rng.randrange(1, room // 2), priority=rng.randrange(3)))
    everyone = list(todo)
    for _ in range(10_000):
        while todo and rng.random() < 0.3:
            loop.scheduler.add(todo.pop())
        plan = loop.step()
        assert sum(work.count for work in plan) <= loop.scheduler.most_tokens
        if not (todo or loop.scheduler.waiting or loop.scheduler.running):
            break
    assert len(loop.done) == len(everyone)
    assert all(one.answer == alone(one.prompt, one.most_new) for one in everyone)
    assert (loop.pool.used, set(loop.pool.references)) == (0, {0})
    assert sum(one.preempted for one in everyone) == loop.scheduler.preemptions


def test_a_small_pool_preempts_the_last_and_recomputes_it():
    loop = Loop(4, 2)
    first, second = new([1, 0, 1], 5), new([0, 0, 1], 5)
    for one in (first, second):
        loop.scheduler.add(one)
    while len(loop.done) < 2:
        loop.step()
    assert (first.preempted, second.preempted > 0) == (0, True)
    assert [one.answer for one in (first, second)] == [alone([1, 0, 1], 5), alone([0, 0, 1], 5)]


def test_a_long_prompt_does_not_make_decoding_wait():
    loop = Loop(64, 4, most_tokens=8)
    short, long = new([1, 1], 10), new([1] * 60, 1)
    loop.scheduler.add(short)
    loop.step()
    loop.scheduler.add(long)
    for _ in range(8):
        counts = {work.sequence: work.count for work in loop.step()}
        assert counts[short] == 1
        assert counts[long] == 7  # what the budget leaves


def test_a_smaller_priority_goes_first():
    loop = Loop(64, 4, most_tokens=4)
    late, urgent = new([1] * 4), new([0] * 4, priority=-1)
    loop.scheduler.add(late)
    loop.scheduler.add(urgent)
    assert [work.sequence for work in loop.step()] == [urgent]


def test_a_removed_sequence_leaves_no_block():
    loop = Loop(8, 2)
    one, two = new([1, 1, 1]), new([0, 0, 0])
    loop.scheduler.add(one)
    loop.step()
    loop.scheduler.add(two)
    loop.scheduler.remove(one)
    loop.scheduler.remove(two)
    assert loop.pool.used == 0
    assert loop.step() == []
