"""One step of continuous batching, with preemption.

waiting: list of (name, tokens), in the order in which they are to be served. running: list of (name, tokens, blocks),
oldest first: tokens in the cache and blocks that hold them. free: how many blocks are free; size: tokens in a block;
most: how many requests may run. schedule(...) → a dict of

running: what runs in this step, in the form and order of running. First the requests that ran before, in their order:
each gets one token more, and one block more where its blocks are full. If none is free for it, the last of those
that still run is preempted, which may be this request itself, and its blocks are free again; so on until one is free
or it is itself preempted.
Then, only if nobody was preempted in this step, requests from waiting, in order, as long as fewer than `most` run and
the blocks for their tokens are free; they get those blocks, and no further token. The first that does not fit ends it:
none is served before one that waits in front of it.
waiting: those that still wait, as (name, tokens); the preempted in front, oldest first, with the tokens that they had
at the start of the step.
free: how many blocks are free afterwards.

    >>> schedule([("c", 3)], [("a", 4, 2), ("b", 2, 1)], free=0, size=2, most=4)
    {'running': [('a', 5, 3)], 'waiting': [('b', 2), ('c', 3)], 'free': 0}
    >>> schedule([("c", 3)], [("a", 3, 2)], free=2, size=2, most=4)
    {'running': [('a', 4, 2), ('c', 3, 2)], 'waiting': [], 'free': 0}
"""

from typing import Any


def schedule(
    waiting: list[tuple[str, int]], running: list[tuple[str, int, int]], free: int, size: int, most: int
) -> dict[str, Any]:
    queue = list(running)
    served: list[tuple[str, int, int]] = []
    preempted: list[tuple[str, int]] = []
    while queue:
        name, tokens, blocks = queue.pop(0)
        needed = int(tokens == blocks * size)
        while needed > free and queue:
            last, its_tokens, its_blocks = queue.pop()
            preempted.insert(0, (last, its_tokens))
            free += its_blocks
        if needed > free:
            preempted.insert(0, (name, tokens))
            free += blocks
        else:
            free -= needed
            served.append((name, tokens + 1, blocks + needed))
    rest = list(waiting)
    while not preempted and rest and len(served) < most:
        name, tokens = rest[0]
        needed = -(-tokens // size)
        if needed > free:
            break
        free -= needed
        served.append((name, tokens, needed))
        rest.pop(0)
    return {"running": served, "waiting": preempted + rest, "free": free}
