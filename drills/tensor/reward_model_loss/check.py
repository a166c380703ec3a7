import torch

from finetune.drills.cases import Case, gradients


def drive(code, chosen, rejected, chosen_lengths, rejected_lengths, margins):
    leaves = [x.clone().requires_grad_() for x in (chosen, rejected)]
    loss, accuracy = code.reward_loss(*leaves, chosen_lengths, rejected_lengths, margins)
    a, b = gradients(loss, *leaves)
    found = {"loss": loss.detach(), "accuracy": float(accuracy)}
    return found | {"gradient of chosen": a, "gradient of rejected": b}


def cases(draw):
    def arguments(b, t, u, margin=0.0):
        lengths = draw.integers(t + 1, b, low=1), draw.integers(u + 1, b, low=1)
        return [draw.normal(b, t), draw.normal(b, u), *lengths, draw.uniform(b) * margin]

    def scores(better, worse, margin=0.0):
        one = torch.ones(1, dtype=torch.int64)
        return [torch.tensor([[better]]), torch.tensor([[worse]]), one, one, torch.tensor([margin])]

    yield Case("one token", scores(1.0, 0.5))
    yield Case("a tie", scores(1.0, 1.0))
    yield Case("right, within the margin", scores(1.0, 0.5, 1.0))
    yield Case("wrong by 1e4", scores(0.0, 1e4))
    yield Case("right by 1e4", scores(1e4, 0.0))
    yield Case("wrong by 100", scores(-50.0, 50.0))
    full = arguments(2, 3, 3)
    full[2], full[3] = torch.tensor([3, 3]), torch.tensor([3, 3])
    yield Case("no padding", full)
    padded = arguments(2, 3, 3)
    padded[2], padded[3] = torch.tensor([1, 2]), torch.tensor([2, 1])
    yield Case("padding", padded)
    yield Case("unlike widths", arguments(3, 5, 2, 1.0))
    yield Case("37 pairs", arguments(37, 13, 17, 2.0), length=37)
