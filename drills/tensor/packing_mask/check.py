from finetune.drills.cases import Case


def cases(draw):
    yield Case("one token", [[[5]], 1])
    yield Case("one document", [[[5, 6, 7]], 3])
    yield Case("one token and padding", [[[5]], 3])
    yield Case("two documents", [[[5, 6], [7, 8]], 4])
    yield Case("nothing but padding", [[], 2])
    yield Case("an empty document", [[[5, 6], [], [7, 8, 9]], 6])
    yield Case("an empty document first", [[[], [5, 6]], 2])
    yield Case("the same document twice", [[[5, 6], [5, 6]], 5])
    yield Case("documents with token 0", [[[0, 0, 1], [0, 2]], 7])
    many = [draw.integers(500, n, low=1).tolist() for n in (7, 1, 13, 2, 31, 5)]
    yield Case("six documents and padding", [many, 67])
    yield Case("six documents, no padding", [many, sum(map(len, many))])
