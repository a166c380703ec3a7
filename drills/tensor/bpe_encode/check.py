from finetune.drills.cases import Case


def cases(draw):
    ab = [("a", "b")]
    yield Case("empty text", ["", ab])
    yield Case("one letter", ["a", ab])
    yield Case("no merges", ["abc", []])
    yield Case("one merge", ["abab", ab])
    yield Case("the later pair was learned first", ["abc", [("b", "c"), ("a", "b")]])
    yield Case("the longest token is not reached", ["abcd", [("b", "c"), ("a", "b"), ("c", "d"), ("ab", "cd")]])
    yield Case("merges of merges", ["lowerlow", [("l", "o"), ("lo", "w"), ("e", "r"), ("low", "er")]])
    yield Case("a letter repeated", ["aaaaa", [("a", "a"), ("aa", "a")]])
    yield Case("three of a letter", ["aaab", [("a", "a"), ("a", "b")]])
    chat = ["<|end|>"]
    ends = [("<", "|"), ("e", "n"), ("en", "d"), ("a", "<"), (">", "a")]
    yield Case("only a special token", ["<|end|>", ends, chat])
    yield Case("a special token between", ["ba<|end|>ab", ends, chat])
    yield Case("two special tokens side by side", ["<|end|><|end|>a", ends, chat])
    yield Case("the text of a special token, in part", ["end<|end", ends, chat])
    yield Case("one special token starts another", ["a<s><s>2b", ab, ["<s>", "<s>2"]])
    yield Case("one special token ends another", ["a<s>b", ab, ["s>", "<s>"]])
    yield Case("special tokens made of merged letters", ["cabcab", [("a", "b"), ("c", "ab")], ["bc"]])
    yield Case("signs that mean something in a pattern", ["a.b[x]a", [("a", "."), ("[", "x")], ["[x]", "."]])
    from_letters = "".join("abcd"[i] for i in draw.integers(4, 90).tolist())
    learned = [("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "a"), ("d", "d"), ("ab", "a"), ("ba", "ba"), ("c", "c")]
    yield Case("ninety letters", [from_letters, learned, ["adc", "ad"]])
