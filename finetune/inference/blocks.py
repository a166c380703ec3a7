"""The pool of cache blocks: reference counts, a prefix cache by the hash of content, copy on write (Kwon et al. 2023,
arXiv:2309.06180, §4). Only numbers of blocks are kept here; the keys and values are in the engine's cache.

    a sequence of n tokens owns ⌈n / block_size⌉ blocks, named in its table; only the last may be partly filled
    references[block] = number of tables that name it; 0: the block is free
    key of a full block = SHA-256(key of the block before it, its tokens); that of the first begins with the root key

A free block keeps its content until it is given to somebody else: the one that became free first goes first. Until then
a sequence with the same prefix takes it back, and its tokens need not be computed again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


class NoBlocks(Exception):
    """The pool has no free block: the scheduler must preempt a sequence."""


@dataclass
class Table:
    """The blocks of one sequence. `tokens`: how many of its tokens they hold; `root`: what its keys begin with."""

    root: bytes = b""
    blocks: list[int] = field(default_factory=list)
    tokens: int = 0
    keys: list[bytes] = field(default_factory=list)  # of the full blocks that have been named to the prefix cache


class BlockPool:
    """`count` blocks of `block_size` tokens."""

    def __init__(self, count: int, block_size: int, prefix_cache: bool = True) -> None:
        self.count, self.block_size, self.prefix_cache = count, block_size, prefix_cache
        self.references = [0] * count
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # the first is given away first
        self.key_of: dict[int, bytes] = {}  # of blocks whose content is in the prefix cache
        self.block_of: dict[bytes, int] = {}

    @property
    def used(self) -> int:
        """Blocks that some table names."""
        return self.count - len(self.free)

    def needed(self, table: Table, new: int) -> int:
        """Free blocks that `extend(table, new)` takes."""
        more = -(-(table.tokens + new) // self.block_size) - len(table.blocks)
        return more + (new > 0 and self.shares_last(table))

    def room(self, table: Table) -> int:
        """Tokens by which `extend` can lengthen the table now."""
        free = len(self.free) - self.shares_last(table)
        return (len(table.blocks) + free) * self.block_size - table.tokens if free >= 0 else 0

    def match(self, table: Table, prompt: Sequence[int]) -> int:
        """Fills an empty table with the cached blocks of the longest known prefix of `prompt`; returns its tokens. At
        least the last token is left to compute: its logits are wanted."""
        key = table.root
        if self.prefix_cache:
            for start in range(0, len(prompt) - self.block_size, self.block_size):
                key = self.key(key, prompt[start : start + self.block_size])
                block = self.block_of.get(key)
                if block is None:
                    break
                self.free.pop(block, None)
                self.references[block] += 1
                table.blocks.append(block)
                table.keys.append(key)
                table.tokens += self.block_size
        return table.tokens

    def extend(self, table: Table, new: int) -> list[tuple[int, int]]:
        """Makes room for `new` tokens. Returns the pairs (source, destination) of blocks to copy before they are
        written: a last block that other tables share becomes the table's own. NoBlocks, with nothing changed, if there
        are too few free blocks."""
        if self.needed(table, new) > len(self.free):
            raise NoBlocks
        copies = []
        if new and self.shares_last(table):
            source = table.blocks[-1]
            table.blocks[-1] = self.take()
            self.references[source] -= 1
            copies.append((source, table.blocks[-1]))
        elif new and table.tokens % self.block_size:
            self.forget(table.blocks[-1])  # it was full before `shrink`, and is written again now
        table.tokens += new
        while len(table.blocks) * self.block_size < table.tokens:
            table.blocks.append(self.take())
        return copies

    def shares_last(self, table: Table) -> bool:
        """Whether the next token goes into a partly filled block that another table names too."""
        return table.tokens % self.block_size > 0 and self.references[table.blocks[-1]] > 1

    def slot(self, table: Table, token: int) -> int:
        """Where token number `token` of the sequence is in the cache, counted in tokens."""
        return table.blocks[token // self.block_size] * self.block_size + token % self.block_size

    def unnamed(self, table: Table) -> bool:
        """Whether the table has a full block that the prefix cache does not know."""
        return self.prefix_cache and table.tokens // self.block_size > len(table.keys)

    def publish(self, table: Table, tokens: Sequence[int]) -> None:
        """Names the table's full blocks to the prefix cache; `tokens`: those of the sequence whose keys and values are
        written. Of two blocks with the same content the first stays the known one."""
        if not self.unnamed(table):
            return
        for i in range(len(table.keys), min(len(tokens), table.tokens) // self.block_size):
            before = table.keys[-1] if table.keys else table.root
            key = self.key(before, tokens[i * self.block_size : (i + 1) * self.block_size])
            table.keys.append(key)
            if key not in self.block_of:
                self.block_of[key], self.key_of[table.blocks[i]] = table.blocks[i], key

    def fork(self, table: Table) -> Table:
        """A second sequence with the same tokens, which shares all blocks until one of the two writes."""
        for block in table.blocks:
            self.references[block] += 1
        return Table(table.root, [*table.blocks], table.tokens, [*table.keys])

    def shrink(self, table: Table, tokens: int) -> None:
        """Cuts the sequence to its first `tokens` tokens: rejected drafts give their blocks back."""
        keep = -(-tokens // self.block_size)
        self.give(table.blocks[keep:])
        del table.blocks[keep:], table.keys[tokens // self.block_size :]
        table.tokens = tokens

    def release(self, table: Table) -> None:
        """Gives all blocks back; the table is empty afterwards."""
        self.shrink(table, 0)

    def take(self) -> int:
        block, _ = self.free.popitem(last=False)
        self.forget(block)
        self.references[block] = 1
        return block

    def forget(self, block: int) -> None:
        """Removes the block from the prefix cache, if it is there: its content changes."""
        if key := self.key_of.pop(block, None):
            del self.block_of[key]

    def give(self, blocks: Sequence[int]) -> None:
        # The last block of a prefix is of use to the fewest: it becomes the first to be given away.
        for block in reversed(blocks):
            self.references[block] -= 1
            if not self.references[block]:
                self.free[block] = None
                if block not in self.key_of:  # nobody can take it back
                    self.free.move_to_end(block, last=False)

    def key(self, before: bytes, tokens: Sequence[int]) -> bytes:
        return hashlib.sha256(before + array("q", tokens).tobytes()).digest()
