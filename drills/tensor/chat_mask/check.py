from finetune.drills.cases import Case

HEADS = {"system": [1], "user": [2], "assistant": [3, 4]}


def cases(draw):
    yield Case("one answer", [[("assistant", [7])], HEADS, 0, 10])
    yield Case("a question, an answer", [[("user", [7]), ("assistant", [8, 9])], HEADS, 0, 99])
    yield Case("no turn", [[], HEADS, 0, 4])
    yield Case("an empty answer", [[("user", [7]), ("assistant", [])], HEADS, 0, 99])
    yield Case("only a question", [[("system", [5, 6]), ("user", [7])], HEADS, 0, 99])
    twice = [("user", [7]), ("assistant", [8]), ("user", [9]), ("assistant", [10])]
    yield Case("two answers", [twice, HEADS, 0, 99])
    yield Case("the answer repeats the question", [[("user", [7, 8]), ("assistant", [7, 8])], HEADS, 0, 99])
    yield Case("an answer that holds ids of heads", [[("user", [3, 4]), ("assistant", [3, 4, 2])], HEADS, 0, 99])
    yield Case("cut in the answer", [twice, HEADS, 0, 5])
    yield Case("cut at the limit", [twice, HEADS, 0, 14])
    roles = ["system"] + ["user", "assistant"] * 5
    long = [(role, draw.integers(1000, int(draw.integers(40, 1)), low=10).tolist()) for role in roles]
    yield Case("eleven turns", [long, HEADS, 0, 150])
