import torch

from finetune.drills.cases import Case


def cases(draw):
    for scale in (False, True):
        said = "scaled" if scale else "not scaled"
        yield Case(f"two answers, {said}", [torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), scale])
        yield Case(f"one answer, {said}", [torch.tensor([1.0]), torch.tensor([3]), scale])
        yield Case(f"all equal, {said}", [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0, 0, 0]), scale])
        yield Case(f"two groups, {said}", [draw.normal(4), torch.tensor([0, 0, 1, 1]), scale])
        yield Case(f"groups in turn, {said}", [draw.normal(4), torch.tensor([0, 1, 0, 1]), scale])
    yield Case("groups of unlike size", [draw.normal(5), torch.tensor([4, 9, 9, 4, 9]), True])
    yield Case("thirteen times 0.7, whose mean is rounded", [torch.full((13,), 0.7), torch.full((13,), 5), True])
    yield Case("right or wrong", [torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), torch.zeros(5, dtype=torch.int64), True])
    yield Case("rewards of 1e-4", [torch.tensor([1e-4, 2e-4, 4e-4]), torch.zeros(3, dtype=torch.int64), True])
    equal = torch.cat([torch.full((3,), 0.7), draw.normal(3)])
    yield Case("a group of equals among others", [equal, torch.tensor([-1, -1, -1, 0, 0, 0]), True])
    yield Case("67 answers", [draw.normal(67), draw.integers(9, 67), True])
