from finetune.drills.cases import Case


def drive(code, size, calls):
    cache = code.PrefixCache(size)
    return [getattr(cache, name)(*arguments) for name, *arguments in calls]


def cases(draw):
    def case(name, size, *calls):
        return Case(name, [size, [*calls]])

    def insert(tokens, *blocks):
        return "insert", tokens, [*blocks]

    def lookup(*tokens):
        return "lookup", [*tokens]

    one, two, three = [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]
    yield case("an empty cache", 2, lookup(*three))
    yield case("the same prompt and a token", 2, insert(one, 7), lookup(1, 2, 3))
    yield case("the same prompt: a token is left", 2, insert(two, 7, 8), lookup(*two))
    yield case("blocks of one token", 1, insert(two, 4, 5, 6, 7), lookup(*two), lookup(1), lookup())
    yield case("a block in part is not noted", 2, insert([1, 2, 3], 7, 8), lookup(*three), lookup(*two))
    yield case("another second block", 2, insert(three, 7, 8, 9), lookup(1, 2, 9, 9, 5, 6, 1))
    yield case("the same tokens elsewhere", 2, insert(two, 7, 8), lookup(3, 4, 1), lookup(9, 9, 3, 4, 1))
    other = [8, 8, 3, 4, 5, 6]
    yield case("the same tokens after others", 2, insert(three, 7, 8, 9), insert(other, 1, 2, 3), lookup(*other, 7))
    yield case("a block that repeats", 2, insert([1] * 6, 7, 8, 9), lookup(*[1] * 7), lookup(*[1] * 4))
    yield case("noted twice: the first stays", 2, insert(two, 7, 8), insert(three, 4, 5, 6), lookup(*three, 7))
    yield case("evicted", 2, insert(three, 7, 8, 9), ("evict", 9), lookup(*three, 7))
    gap = insert(three, 7, 8, 9), ("evict", 7), lookup(*three, 7), insert(one, 3), lookup(*three, 7)
    yield case("a gap, filled again", 2, *gap)
    yield case("an unknown block is evicted", 2, insert(one, 7), ("evict", 8), lookup(1, 2, 3))
    calls, number = [], 0
    for _ in range(40):
        tokens = draw.integers(2, int(draw.integers(17))).tolist()
        blocks = -(-len(tokens) // 3)
        calls += [("lookup", tokens), ("insert", tokens, [*range(number, number + blocks)])]
        number += blocks
        calls.append(("evict", int(draw.integers(number + 1))))
    yield Case("forty prompts of zeros and ones", [3, calls])
