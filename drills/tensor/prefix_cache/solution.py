"""A prefix cache: which blocks of keys and values of earlier prompts a new prompt may use.

PrefixCache(size): size is the number of tokens in a block.
insert(tokens, blocks): tokens is a list of ids whose keys and values are computed, blocks the list of the numbers of
the blocks that hold them, in order, the last one maybe in part. All full blocks are noted. If the cache knows a block
with the same tokens after the same tokens already, the number that was noted first stays.
lookup(tokens) → the list of block numbers that hold the longest known prefix of tokens. Only full blocks are used, and
at least one token is always left to compute, since its logits are needed.
evict(block): the block with this number is forgotten, if it was noted; those after it stay noted, though a lookup does
not reach them until the gap is filled.
Keys and values of a token depend on all tokens before it.

    >>> cache = PrefixCache(size=2)
    >>> cache.insert([1, 2, 3, 4, 5], [7, 8, 9])
    >>> cache.lookup([1, 2, 3, 4, 6]), cache.lookup([1, 2, 3, 4]), cache.lookup([3, 4, 5])
    ([7, 8], [7], [])
"""


class PrefixCache:
    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: dict[int, int] = {}

    def insert(self, tokens: list[int], blocks: list[int]) -> None:
        for key, block in zip(self._keys(tokens, len(tokens)), blocks, strict=False):
            self.blocks.setdefault(key, block)

    def lookup(self, tokens: list[int]) -> list[int]:
        found: list[int] = []
        for key in self._keys(tokens, len(tokens) - 1):
            if key not in self.blocks:
                break
            found.append(self.blocks[key])
        return found

    def evict(self, block: int) -> None:
        self.blocks = {key: each for key, each in self.blocks.items() if each != block}

    def _keys(self, tokens: list[int], count: int) -> list[int]:
        """A hash for each full block within the first `count` tokens: of the block before it and of its tokens."""
        keys, before = [], 0
        for at in range(0, count - self.size + 1, self.size):
            before = hash((before, *tokens[at : at + self.size]))
            keys.append(before)
        return keys
