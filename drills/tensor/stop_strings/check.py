from finetune.drills.cases import Case


def drive(code, stops, pieces):
    stream = code.StopStream(stops)
    found = []
    for piece in pieces:
        found.append((stream.push(piece), stream.done))
    return {"push and done": found, "close": stream.close()}


def cases(draw):
    yield Case("no stop strings", [[], ["ab", "c"]])
    yield Case("no stop string in the text", [["x"], ["ab", "c"]])
    yield Case("a stop string in one piece", [["."], ["ab.cd", "e"]])
    yield Case("a stop string across two pieces", [["END"], ["aE", "NDb"]])
    yield Case("one character at a time", [["END"], [*"aENDb"]])
    yield Case("begun, but not a stop string", [["END"], ["aEN", "db"]])
    yield Case("held back at the end", [["END"], ["aE", "N"]])
    yield Case("an empty piece", [["END"], ["aEN", "", "D"]])
    yield Case("the start comes again: EEND", [["END"], ["EE", "ND"]])
    yield Case("a start inside a start: aab", [["aab"], ["aa", "a", "b"]])
    yield Case("two, the second is complete first", [["END", "ab"], ["xab.END"]])
    yield Case("one inside another", [["abcd", "bc"], ["xab", "c", "d"]])
    yield Case("one inside another, one piece", [["abcd", "bc"], ["xabcd"]])
    yield Case("two that end at one character", [["c", "abc"], ["xa", "bcd"]])
    yield Case("two that end at one character, one piece", [["c", "abc"], ["xabcd"]])
    yield Case("more text after the stop", [["."], ["a.", "b.", "c"]])
    yield Case("not ASCII", [["。\n"], ["你好。", "\n再见"]])
    text = "".join("abE"[i] for i in draw.integers(3, 150).tolist())
    stops = ["aaaab", "EEEEE", "abababa"]
    yield Case("150 characters", [stops, [text[i : i + 7] for i in range(0, 150, 7)]])
    yield Case("150 characters, one at a time", [stops, [*text]])
