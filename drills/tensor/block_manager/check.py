from finetune.drills.cases import Case


def drive(code, blocks, size, calls):
    """After each call: what it gave, all tables, and the number of free blocks."""
    manager, names, found = code.BlockManager(blocks, size), [], []
    for call, name, *more in calls:
        try:
            given = getattr(manager, call)(name, *more)
            names = [n for n in names if n != name] if call == "free" else names
            names += {"allocate": [name], "fork": more}.get(call, [])
        except MemoryError:
            given = "MemoryError"
        tables = {each: list(manager.table(each)) for each in names}
        found.append({f"{call}{(name, *more)}": given, "tables": tables, "available": manager.available()})
    return found


def cases(draw):
    def case(name, blocks, size, text):
        """Calls in one line: +a3 allocate, a append, a>b fork, -a free."""
        calls = []
        for word in text.split():
            if word[0] == "+":
                calls.append(("allocate", word[1], int(word[2:])))
            elif word[0] == "-":
                calls.append(("free", word[1]))
            else:
                calls.append(("fork", word[0], word[2]) if ">" in word else ("append", word))
        return Case(name, [blocks, size, calls])

    yield case("one token", 2, 2, "+a1")
    yield case("full blocks", 4, 2, "+a4")
    yield case("append into a block with room", 2, 2, "+a1 a a")
    yield case("freed, then the smallest number", 4, 2, "+a2 +b2 -a +c3")
    yield case("too few blocks to allocate", 2, 2, "+a5 +b4")
    yield case("too few blocks to append", 2, 2, "+b4 b -b")
    yield case("fork", 4, 2, "+a3 a>b -a -b")
    yield case("fork, the last block is full", 4, 2, "+a2 a>b b a")
    yield case("copy on write", 4, 2, "+a3 a>b b a")
    yield case("copy on write, the parent first", 4, 4, "+a1 a>b a b b")
    yield case("the copy does not fit", 2, 2, "+a3 a>b b -a b")
    yield case("two forks", 5, 2, "+a1 a>b b>c c b -a -c")
    yield case("blocks of one token", 4, 1, "+a1 a>b a b b")
    calls, names = [("allocate", "s0", 5), ("allocate", "s1", 2)], ["s0", "s1"]
    for i in range(2, 90):
        name = names[int(draw.integers(len(names)))]
        kind = int(draw.integers(8))
        if kind == 0 and len(names) > 1:
            calls.append(("free", name))
            names.remove(name)
        elif kind == 1 and len(names) < 6:
            calls.append(("fork", name, f"s{i}"))
            names.append(f"s{i}")
        else:
            calls.append(("append", name))
    yield Case("ninety calls", [23, 3, calls])
