from finetune.drills.cases import Case


def drive(code, sizes, ranks):
    bytes_of = [float(code.state_bytes(sum(sizes), ranks, stage)) for stage in range(4)]
    return {"partition": [list(each) for each in code.partition(sizes, ranks)], "state_bytes by stage": bytes_of}


def cases(draw):
    yield Case("one rank, one parameter", [[3], 1])
    yield Case("two ranks, one parameter of two", [[2], 2])
    yield Case("two ranks, one parameter of three", [[3], 2])
    yield Case("a boundary between parameters", [[3, 3], 2])
    yield Case("a parameter in two parts", [[3, 4], 2])
    yield Case("a parameter in three parts", [[1, 7, 1], 3])
    yield Case("the last part is shorter", [[5, 5], 4])
    yield Case("more ranks than elements", [[2, 1], 5])
    yield Case("a parameter without elements", [[2, 0, 2], 2])
    yield Case("no parameter", [[], 2])
    sizes = draw.integers(300, 40).tolist()
    yield Case("forty parameters, eight ranks", [sizes, 8])
    yield Case("forty parameters, seven ranks", [sizes, 7])
