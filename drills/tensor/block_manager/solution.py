"""Blocks of a paged cache, shared by reference counts and copied on write.

BlockManager(blocks, size): blocks 0, 1, …, blocks − 1 of `size` tokens each, all free. A new block is always the free
one with the smallest number.
allocate(name, tokens): a new sequence gets as many blocks as its tokens need (tokens ≥ 1).
append(name): room for one token more. If the last block is full, the sequence gets a new one; if it has room but
another sequence holds it too, the sequence gets a new block in its place, and the method returns (old, new), which the
caller copies. Returns None in all other cases.
fork(name, child): a new sequence `child` with the same tokens, which shares all blocks.
free(name): the sequence gives its blocks back; a block is free when nobody holds it.
table(name) → the list of its blocks; available() → the number of free blocks.
If there are not enough free blocks, allocate and append raise MemoryError and change nothing.

    >>> manager = BlockManager(blocks=4, size=2)
    >>> manager.allocate("a", 3)
    >>> manager.fork("a", "b")
    >>> manager.append("b"), manager.table("a"), manager.table("b"), manager.available()
    ((1, 2), [0, 1], [0, 2], 1)
    >>> manager.free("a")
    >>> manager.available()
    2
"""


class BlockManager:
    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.holders = [0] * blocks
        self.tables: dict[str, list[int]] = {}
        self.tokens: dict[str, int] = {}

    def allocate(self, name: str, tokens: int) -> None:
        needed = -(-tokens // self.size)
        if needed > self.available():
            raise MemoryError
        self.tables[name] = [self._take() for _ in range(needed)]
        self.tokens[name] = tokens

    def append(self, name: str) -> tuple[int, int] | None:
        table = self.tables[name]
        full = self.tokens[name] == len(table) * self.size
        shared = self.holders[table[-1]] > 1
        copy = None
        if full or shared:
            if not self.available():
                raise MemoryError
            new = self._take()
            if full:
                table.append(new)
            else:
                copy = table[-1], new
                self.holders[table[-1]] -= 1
                table[-1] = new
        self.tokens[name] += 1
        return copy

    def fork(self, name: str, child: str) -> None:
        self.tables[child] = list(self.tables[name])
        self.tokens[child] = self.tokens[name]
        for block in self.tables[child]:
            self.holders[block] += 1

    def free(self, name: str) -> None:
        for block in self.tables.pop(name):
            self.holders[block] -= 1
        del self.tokens[name]

    def table(self, name: str) -> list[int]:
        return self.tables[name]

    def available(self) -> int:
        return self.holders.count(0)

    def _take(self) -> int:
        block = self.holders.index(0)
        self.holders[block] = 1
        return block
