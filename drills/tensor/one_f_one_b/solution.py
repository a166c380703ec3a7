"""The order of work in a pipeline: 1F1B.

order(stage, stages, batches): what a stage (0 is the first) does, for `batches` micro-batches → a list of ("F", i) and
("B", i), the forward and backward of micro-batch i. Each kind is in order of i, without holes. A stage first does as
many forwards as there are stages after it, then in turn one forward and one backward as long as forwards are left, then
the other backwards. If there are fewer micro-batches than stages after it, all forwards come first.
most_alive(stage, stages, batches) → the greatest number of micro-batches whose forward is done and whose backward is
not, at any time: their activations are kept.
bubble(stages, batches) → the share of a step's time that a stage is idle, a float, if forwards all take the same time,
backwards all take the same time, and nothing else takes any.

    >>> order(0, 2, 3)
    [('F', 0), ('F', 1), ('B', 0), ('F', 2), ('B', 1), ('B', 2)]
    >>> most_alive(0, 2, 3), bubble(2, 3)
    (2, 0.25)
"""


def order(stage: int, stages: int, batches: int) -> list[tuple[str, int]]:
    ahead = min(stages - stage - 1, batches)
    work = [("F", i) for i in range(ahead)]
    for i in range(batches - ahead):
        work += [("F", ahead + i), ("B", i)]
    return work + [("B", i) for i in range(batches - ahead, batches)]


def most_alive(stage: int, stages: int, batches: int) -> int:
    return min(stages - stage, batches)


def bubble(stages: int, batches: int) -> float:
    return (stages - 1) / (batches + stages - 1)
