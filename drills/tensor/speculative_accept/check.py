import torch

from finetune.drills.cases import Case


def cases(draw):
    def case(name, drafted, draft, target, *uniforms):
        return Case(name, [drafted, torch.tensor(draft), torch.tensor(target), [*uniforms]])

    flat, first = [[0.25] * 4], [1.0, 0.0, 0.0, 0.0]
    yield case("accepted, one more is drawn", [1], flat, [[0.1, 0.5, 0.2, 0.2], [0.0, 0.2, 0.3, 0.5]], 0.9, 0.7)
    less = [[0.5, 0.125, 0.25, 0.125], first]
    yield case("accepted, though less probable", [1], flat, less, 0.4, 0.3)
    yield case("not accepted", [1], flat, less, 0.6, 0.3)
    more = [[0.0, 0.35, 0.25, 0.4], first]
    yield case("not accepted, the first of the residual", [0], flat, more, 0.1, 0.3)
    yield case("not accepted, the second of the residual", [0], flat, more, 0.1, 0.8)
    yield case("impossible for the target, uniform 0", [2], flat, [[0.5, 0.25, 0.0, 0.25], first], 0.0, 0.0)
    nothing = torch.zeros(0, 3)
    yield Case("nothing drafted", [[], nothing, torch.tensor([[0.2, 0.3, 0.5]]), [0.4]])
    yield Case("no cumulative sum exceeds", [[], nothing, torch.tensor([[0.4, 0.5999, 0.0]]), [0.99995]])
    two, half = [[0.5, 0.5], [0.5, 0.5]], [0.5, 0.5]
    yield case("the first is not accepted, the second would be", [0, 1], two, [[0.1, 0.9], half, half], 0.5, 0.1, 0.5)
    yield case("the second is not accepted", [1, 0], two, [[0.1, 0.9], [0.2, 0.8], half], 0.5, 0.9, 0.1)
    for i in range(8):
        k, v = 4, 7
        probabilities = draw.normal(2 * k + 1, v, scale=0.7).softmax(-1)
        drafted = draw.integers(v, k).tolist()
        uniforms = draw.uniform(k + 1).tolist()
        yield Case(f"four drafted of seven, {i + 1}", [drafted, probabilities[:k], probabilities[k:], uniforms])
