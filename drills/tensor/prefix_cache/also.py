class PrefixCache:
    """A tree of blocks."""

    def __init__(self, size):
        self.size, self.root = size, {}

    def insert(self, tokens, blocks):
        at = self.root
        for i in range(len(tokens) // self.size):
            node = at.setdefault(tuple(tokens[i * self.size : (i + 1) * self.size]), [None, {}])
            if node[0] is None:
                node[0] = blocks[i]
            at = node[1]

    def lookup(self, tokens):
        at, found = self.root, []
        for i in range((len(tokens) - 1) // self.size):
            node = at.get(tuple(tokens[i * self.size : (i + 1) * self.size]))
            if node is None or node[0] is None:
                break
            found.append(node[0])
            at = node[1]
        return found

    def evict(self, block):
        rest = [self.root]
        while rest:
            for node in rest.pop().values():
                node[0] = None if node[0] == block else node[0]
                rest.append(node[1])
