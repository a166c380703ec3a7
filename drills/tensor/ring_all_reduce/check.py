import torch

from finetune.drills.cases import Case


def drive(code, tensors):
    n, sizes = len(tensors), []

    def exchange(messages):
        sizes.append([message.numel() for message in messages])
        return [messages[r - 1].clone() for r in range(n)]

    results = code.ring_all_reduce(tensors, exchange)
    most = -(-tensors[0].numel() // n)
    found = {"results": list(results), "exchanges": len(sizes)}
    found["a message is longer than a chunk"] = any(size > most for each in sizes for size in each)
    found["numbers received in all"] = sum(map(sum, sizes))
    found["the same on all ranks"] = all(torch.equal(each, results[0]) for each in results)
    return found


def cases(draw):
    def arguments(n, m):
        return [[draw.normal(m) for _ in range(n)]]

    yield Case("one rank", arguments(1, 3), length=4)
    yield Case("two ranks, two numbers", arguments(2, 2), length=4)
    yield Case("two ranks, three numbers", arguments(2, 3), length=4)
    yield Case("three ranks, three numbers", arguments(3, 3), length=4)
    yield Case("three ranks, seven numbers", arguments(3, 7), length=4)
    yield Case("four ranks, eight numbers", arguments(4, 8), length=4)
    yield Case("more ranks than numbers", arguments(5, 3), length=5)
    yield Case("not contiguous", [[draw.strided(13) for _ in range(4)]], length=4)
    yield Case("eleven ranks, 131 numbers", arguments(11, 131), length=11)
