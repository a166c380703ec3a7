from finetune.drills.cases import Case

NAMES = ("wq", "wk", "wv", "wo", "up", "down", "norm1", "norm2")


def drive(code, x, *arrays, pre):
    return code.block(x, dict(zip(NAMES, arrays, strict=True)), pre)


def cases(draw):
    def made(t, d, h, make=draw.normal):
        scale = d**-0.5
        square = [draw.normal(d, d, scale=2 * scale) for _ in range(4)]
        wide = [draw.normal(h, d, scale=2 * scale), draw.normal(d, h, scale=h**-0.5)]
        return [make(t, d), *square, *wide, draw.normal(d) + 1, draw.normal(d) + 1]

    for pre in (True, False):
        name = "norms before" if pre else "norms after"
        yield Case(f"one token of one number, {name}", made(1, 1, 2), {"pre": pre}, length=100)
        yield Case(f"two tokens, {name}", made(2, 3, 4), {"pre": pre}, length=200)
        yield Case(f"five tokens, {name}", made(5, 8, 16), {"pre": pre}, grad=True, length=1000)
        yield Case(f"not contiguous, {name}", made(4, 6, 12, draw.strided), {"pre": pre}, grad=True, length=1000)
        yield Case(f"31 tokens, {name}", made(31, 32, 64), {"pre": pre}, length=1000)
