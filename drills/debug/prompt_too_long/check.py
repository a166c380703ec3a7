from finetune.drills.cases import Case


def cases(draw):
    for name, prompt, answer, limit in (
        ("everything fits", [1, 2], [3], 9),
        ("it fits exactly", [1, 2], [3], 4),
        ("room for one more", [1, 2, 3], [4], 6),
        ("one too many", [1, 2, 3], [4], 4),
        ("no prompt", [], [4, 5], 9),
        ("no answer", [1, 2], [], 3),
        ("one token of the prompt stays", [1, 2, 3], [4, 5], 4),
        ("no room for the prompt", [1, 2, 3], [4, 5], 3),
        ("no room for the token end", [1, 2, 3], [4, 5], 2),
        ("one token", [1, 2, 3], [4, 5], 1),
        ("no answer, one token", [1, 2], [], 1),
        ("no prompt, an answer that is too long", [], [4, 5, 6, 7], 2),
    ):
        yield Case(name, [prompt, answer, 0, limit])
    long = draw.integers(900, 120, low=1).tolist()
    for limit in (20, 50, 64):
        yield Case(f"70 and 50 tokens, at most {limit}", [long[:70], long[70:], 0, limit])
