"""The block pool against what every table should read, under random use; and the prefix cache's rules one by one."""

import random

import pytest

from finetune.inference.blocks import BlockPool, NoBlocks, Table


class Cache:
    """A cache whose keys and values are the tokens themselves: reading a table must give its sequence."""

    def __init__(self, pool):
        self.pool, self.memory = pool, [None] * (pool.count * pool.block_size)

    def write(self, table, history, tokens):
        size, start = self.pool.block_size, table.tokens
        for source, to in self.pool.extend(table, len(tokens)):
            self.memory[to * size : (to + 1) * size] = self.memory[source * size : (source + 1) * size]
        for i, token in enumerate(tokens, start):
            self.memory[self.pool.slot(table, i)] = token
        history += tokens
        self.pool.publish(table, history)

    def read(self, table):
        return [self.memory[self.pool.slot(table, i)] for i in range(table.tokens)]


@pytest.mark.parametrize("seed", range(6))
def test_every_sequence_reads_what_it_wrote(seed):
    """Adds, prompts with shared prefixes, forks, cuts and releases at random; a pool too small for all."""
    rng = random.Random(seed)
    pool = BlockPool(count=rng.choice((6, 12, 40)), block_size=rng.choice((1, 2, 4)))
    cache, live, refused = Cache(pool), [], 0
    for _ in range(1500):
        what = rng.choice(("prompt", "add", "add", "fork", "cut", "release"))
        one = rng.choice(live) if live else None
        try:
            if what == "prompt" or one is None:
                prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
                table = Table(root=rng.choice((b"", b"adapter")))
                known = pool.match(table, prompt)
                assert known < len(prompt)
                live.append((table, prompt[:known]))
                assert cache.read(table) == prompt[:known]
                cache.write(*live[-1], prompt[known:])
            elif what == "add":
                cache.write(*one, [rng.randrange(2) for _ in range(rng.randrange(5))])
            elif what == "fork":
                live.append((pool.fork(one[0]), [*one[1]]))
            elif what == "cut":
                keep = rng.randrange(len(one[1]) + 1)
                pool.shrink(one[0], keep)
                del one[1][keep:]
            else:
                pool.release(one[0])
                live.remove(one)
        except NoBlocks:
            refused += 1
            pool.release(live[0][0])
            del live[0]
        for table, history in live:
            assert cache.read(table) == history
            assert len(table.blocks) == -(-len(history) // pool.block_size)
        named = [block for table, _ in live for block in table.blocks]
        assert [named.count(block) for block in range(pool.count)] == pool.references
        assert set(pool.free) == {block for block in range(pool.count) if not pool.references[block]}
        assert {key: block for block, key in pool.key_of.items()} == pool.block_of
    for table, _ in live:
        pool.release(table)
    assert pool.used == 0
    assert refused or pool.count == 40


def filled(pool, tokens, root=b""):
    table = Table(root)
    pool.match(table, tokens)
    pool.extend(table, len(tokens) - table.tokens)
    pool.publish(table, tokens)
    return table


def test_a_prompt_of_whole_blocks_leaves_its_last_block_to_compute():
    pool = BlockPool(8, 4)
    filled(pool, [*range(8)])
    for length, known in ((4, 0), (5, 4), (8, 4), (9, 8), (12, 8)):
        assert pool.match(Table(), [*range(length)]) == known


def test_the_key_holds_the_root_and_the_order():
    pool = BlockPool(8, 2)
    filled(pool, [1, 2, 3, 4])
    assert pool.match(Table(), [1, 2, 3, 4, 5]) == 4
    assert pool.match(Table(b"another adapter"), [1, 2, 3, 4, 5]) == 0
    assert pool.match(Table(), [3, 4, 1, 2, 5]) == 0  # a block is known by all that is before it too


def test_free_blocks_are_found_again_until_they_are_given_away():
    pool = BlockPool(4, 2)
    pool.release(filled(pool, [1, 2, 3, 4]))
    assert pool.used == 0
    again = Table()
    assert pool.match(again, [1, 2, 3, 4, 5]) == 4
    pool.release(again)
    filled(pool, [7, 7, 7, 7])  # two blocks were never used: these go first
    assert pool.match(Table(), [1, 2, 3, 4, 5]) == 4
    pool = BlockPool(3, 2)
    pool.release(filled(pool, [1, 2, 3, 4]))
    filled(pool, [7, 7, 7, 8])  # one was never used; of the others the end of the prefix is given away
    assert pool.match(Table(), [1, 2, 3, 4, 5]) == 2


def test_a_refusal_changes_nothing():
    pool = BlockPool(2, 2)
    table = filled(pool, [1, 2, 3])
    before = (list(table.blocks), table.tokens, list(pool.references), list(pool.free))
    with pytest.raises(NoBlocks):
        pool.extend(table, 2)
    assert before == (table.blocks, table.tokens, pool.references, list(pool.free))


def test_copy_on_write_only_where_a_partly_filled_block_is_shared():
    pool = BlockPool(6, 2)
    table = filled(pool, [1, 2, 3])
    other = pool.fork(table)
    assert pool.needed(other, 1) == 1
    source = table.blocks[-1]
    assert pool.extend(other, 1) == [(source, other.blocks[-1])]
    assert pool.extend(table, 1) == []  # it is alone again
    third = pool.fork(table)
    assert pool.extend(third, 1) == []  # the shared blocks are full
