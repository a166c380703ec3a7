def schedule(waiting, running, free, size, most):
    alive, i = [[*each] for each in running], 0
    while i < len(alive):
        if alive[i][1] % size or alive[i][1] < alive[i][2] * size:
            i += 1
        elif free:
            free, i = free - 1, i + 1
            alive[i - 1][2] += 1
        else:
            free += alive.pop()[2]
    count = len(alive)
    lost = [(name, tokens) for name, tokens, _ in running[count:]]
    result, waiting = [(name, tokens + 1, blocks) for name, tokens, blocks in alive], [*waiting]
    if not lost:
        for name, tokens in [*waiting]:
            blocks = (tokens + size - 1) // size
            if len(result) >= most or blocks > free:
                break
            result.append((name, tokens, blocks))
            free -= blocks
            del waiting[0]
    return {"running": result, "waiting": lost + waiting, "free": free}
