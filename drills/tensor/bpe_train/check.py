from finetune.drills.cases import Case


def cases(draw):
    yield Case("no words", [{}, 3])
    yield Case("one letter", [{"a": 2}, 3])
    yield Case("one word of two letters", [{"ab": 1}, 3])
    yield Case("no merges", [{"ab": 1}, 0])
    yield Case("two pairs, one more frequent", [{"ab": 2, "cd": 3}, 1])
    yield Case("a rare pair in many words", [{"ab": 9, "cd": 1, "cde": 1, "cdf": 1}, 1])
    yield Case("a tie", [{"zz": 2, "ab": 2, "mn": 2}, 2])
    yield Case("a tie within a word", [{"bca": 1}, 3])
    yield Case("pairs across words", [{"ab": 1, "ba": 1, "bb": 1}, 4])
    yield Case("a letter repeated", [{"aaa": 1, "ab": 2, "cd": 1}, 3])
    yield Case("five of one letter", [{"aaaaa": 3}, 5])
    yield Case("a symbol that ends like the pair", [{"xa": 9, "ab": 3, "xab": 4, "cab": 2}, 6])
    yield Case("fewer merges than asked", [{"abc": 2, "abd": 1}, 50])
    yield Case("low, lower, newest, widest", [{"low": 5, "lower": 2, "newest": 6, "widest": 3}, 12])
    letters = "abcd"
    words = {}
    for row in draw.integers(4, 60, 6).tolist():
        word = "".join(letters[i] for i in row[: 2 + row[5] + row[4] // 3])
        words[word] = 1 + row[0]
    yield Case("sixty words of four letters", [words, 30])
