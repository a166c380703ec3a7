import torch

from finetune.drills.cases import Case, gradients


def drive(code, embeddings, ids, placeholder, features):
    leaves = [x.clone().requires_grad_() for x in (embeddings, features)]
    inputs = [x * 1 for x in leaves]  # no leaves: a write into them is not refused
    try:
        result = code.scatter(inputs[0], ids, placeholder, inputs[1])
    except ValueError:
        return "ValueError"
    weights = torch.arange(1, 1 + result.numel()).view(result.shape) / result.numel()
    a, b = gradients((result.double() * weights).sum(), *leaves)
    found = {"result": result.detach(), "gradient of embeddings": a, "gradient of features": b}
    return found | {"embeddings unchanged": torch.equal(inputs[0], leaves[0])}


def cases(draw):
    def arguments(ids, d, n=None):
        ids = torch.tensor(ids)
        count = int((ids == 9).sum()) if n is None else n
        return [draw.normal(*ids.shape, d), ids, 9, draw.normal(count, d)]

    yield Case("one placeholder", arguments([[9]], 1))
    yield Case("one token, one placeholder", arguments([[3, 9]], 2))
    yield Case("no placeholder", arguments([[3, 4]], 2))
    yield Case("an image of three", arguments([[3, 9, 9, 9, 4]], 2))
    yield Case("two images", arguments([[9, 9, 4, 9, 9]], 3))
    yield Case("two rows", arguments([[3, 9, 9], [9, 3, 9]], 2))
    yield Case("a row without image", arguments([[3, 4], [9, 9]], 2))
    yield Case("too few features", arguments([[9, 9, 9]], 2, n=2))
    yield Case("too many features", arguments([[9, 3, 9]], 2, n=3))
    yield Case("features, but no placeholder", arguments([[1, 3]], 2, n=1))
    half = arguments([[3, 9, 9], [9, 3, 9]], 2)
    half[0] = half[0].bfloat16()
    yield Case("bfloat16 embeddings, float32 features", half)
    yield Case("3 rows of 31", arguments(draw.integers(10, 3, 31, low=6).tolist(), 17))
