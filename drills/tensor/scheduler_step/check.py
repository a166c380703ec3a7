from finetune.drills.cases import Case


def cases(draw):
    yield Case("nothing to do", [[], [], 4, 2, 4])
    yield Case("one runs, room in its block", [[], [("a", 3, 2)], 0, 2, 4])
    yield Case("one runs, its block is full", [[], [("a", 4, 2)], 3, 2, 4])
    yield Case("one waits", [[("a", 5)], [], 4, 2, 4])
    yield Case("one waits, its tokens fill their blocks", [[("a", 4)], [], 2, 2, 4])
    yield Case("one waits, too few blocks", [[("a", 5)], [], 2, 2, 4])
    yield Case("at most two may run", [[("c", 1), ("d", 1)], [("a", 1, 1)], 9, 2, 2])
    yield Case("the first that waits does not fit", [[("b", 9), ("c", 1)], [("a", 1, 1)], 2, 2, 4])
    yield Case("the last is preempted", [[], [("a", 4, 2), ("b", 2, 1)], 0, 2, 4])
    yield Case("room, so that none is preempted", [[], [("a", 3, 2), ("b", 1, 1)], 0, 2, 4])
    yield Case("none else: preempts itself", [[], [("a", 4, 2)], 0, 2, 4])
    yield Case("the last preempts itself", [[], [("a", 3, 2), ("b", 4, 2)], 0, 2, 4])
    yield Case("two are preempted", [[("d", 1)], [("a", 4, 2), ("b", 2, 1), ("c", 3, 2), ("e", 2, 1)], 0, 2, 4])
    full = [("a", 2, 1), ("b", 2, 1), ("c", 2, 1), ("e", 2, 1), ("f", 2, 1)]
    yield Case("three of five are preempted", [[("d", 1)], full, 0, 2, 8])
    yield Case("nobody is admitted after a preemption", [[("c", 1)], [("a", 4, 2), ("b", 6, 3)], 0, 2, 4])
    yield Case("blocks of one token", [[("c", 2)], [("a", 1, 1), ("b", 3, 3)], 4, 1, 4])
    for i in range(6):
        running = [(f"r{j}", n, -(-n // 4)) for j, n in enumerate(draw.integers(25, 7, low=1).tolist())]
        waiting = [(f"w{j}", n) for j, n in enumerate(draw.integers(19, 5, low=1).tolist())]
        yield Case(f"twelve requests, {i} blocks free", [waiting, running, i * i, 4, 10])
