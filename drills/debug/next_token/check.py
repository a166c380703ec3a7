from finetune.drills.cases import Case


def drive(code, ids, length, table):
    """The loss of a model that looks at one token, table (v, v)."""
    inputs, labels = code.examples(ids, length)
    return {"inputs": inputs, "labels": labels, "loss": code.loss(table[inputs], labels)}


def cases(draw):
    def arguments(n, v, length):
        return [draw.integers(v, n), length, draw.normal(v, v)]

    yield Case("three tokens, a piece of two", arguments(3, 3, 2))
    yield Case("three tokens, pieces of one", arguments(3, 3, 1))
    yield Case("five tokens, two pieces of two", arguments(5, 4, 2))
    yield Case("four tokens: only one piece has all labels", arguments(4, 4, 2))
    yield Case("seven tokens, two pieces of three", arguments(7, 5, 3))
    yield Case("nine tokens, pieces of three", arguments(9, 5, 3))
    yield Case("202 tokens, pieces of 17", arguments(202, 31, 17), length=187)
