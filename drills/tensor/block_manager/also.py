import heapq
from collections import Counter


class BlockManager:
    def __init__(self, blocks, size):
        self.heap, self.size = [*range(blocks)], size
        self.count, self.of = Counter(), {}

    def available(self):
        return len(self.heap)

    def table(self, name):
        return [*self.of[name][1]]

    def new(self, n):
        if n > len(self.heap):
            raise MemoryError(f"{n} blocks needed, {len(self.heap)} free")
        taken = [heapq.heappop(self.heap) for _ in range(n)]
        self.count.update(taken)
        return taken

    def drop(self, blocks):
        self.count.subtract(blocks)
        for block in blocks:
            if self.count[block] == 0:
                heapq.heappush(self.heap, block)

    def allocate(self, name, tokens):
        self.of[name] = [tokens, self.new((tokens + self.size - 1) // self.size)]

    def append(self, name):
        tokens, blocks = self.of[name]
        result = None
        if tokens % self.size == 0:
            blocks += self.new(1)
        elif self.count[blocks[-1]] > 1:
            result = (blocks[-1], *self.new(1))
            self.drop(blocks[-1:])
            blocks[-1] = result[1]
        self.of[name][0] += 1
        return result

    def fork(self, name, child):
        tokens, blocks = self.of[name]
        self.of[child] = [tokens, blocks[:]]
        self.count.update(blocks)

    def free(self, name):
        self.drop(self.of.pop(name)[1])
