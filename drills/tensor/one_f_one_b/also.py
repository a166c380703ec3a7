def order(stage, stages, batches):
    work, forwards, backwards = [], 0, 0
    while backwards < batches:
        if forwards < batches and forwards - backwards < stages - stage:
            work.append(("F", forwards))
            forwards += 1
        else:
            work.append(("B", backwards))
            backwards += 1
    return work


def most_alive(stage, stages, batches):
    alive = best = 0
    for kind, _ in order(stage, stages, batches):
        alive += 1 if kind == "F" else -1
        best = max(best, alive)
    return best


def bubble(stages, batches):
    return 1 - batches / (batches + stages - 1)
