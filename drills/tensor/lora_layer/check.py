import torch

from finetune.drills.cases import Case


def drive(code, weight, bias, a, b, x, alpha):
    torch.manual_seed(0)
    layer = code.LoRALinear(weight, bias, len(a), alpha)
    found = {"trained": sorted(name for name, each in layer.named_parameters() if each.requires_grad)}
    y = layer(x)
    y.sum().backward()
    found["at the start"] = y.detach()
    found["b gets a gradient"] = bool(layer.b.grad.abs().sum() > 0)
    with torch.no_grad():
        layer.a.copy_(a)
        layer.b.copy_(b)
    layer.zero_grad()
    y = layer(x)
    y.sum().backward()
    found |= {"trained for a while": y.detach(), "gradient of a": layer.a.grad, "gradient of b": layer.b.grad}
    steps = {
        "merged": ["merge"],
        "merged twice": ["merge"],
        "unmerged": ["unmerge"],
        "unmerged twice": ["unmerge"],
        "merged after training on": ["merge"],
    }
    for step, calls in steps.items():
        if step == "merged after training on":
            with torch.no_grad():
                layer.a.mul_(0.5)
        for name in calls:
            getattr(layer, name)()
        found[step] = layer(x).detach()
    return found


def cases(draw):
    def arguments(out, width, rank, *rows):
        return [
            draw.normal(out, width),
            draw.normal(out),
            draw.normal(rank, width),
            draw.normal(out, rank),
            draw.normal(*rows, width),
        ]

    yield Case("one number", [*arguments(1, 1, 1, 1), 1.0])
    weight, _, a, b, x = arguments(2, 2, 1, 2)
    yield Case("no bias", [weight, None, a, b, x, 1.0])
    yield Case("alpha 3", [*arguments(2, 3, 1, 2), 3.0])
    yield Case("rank 2", [*arguments(3, 2, 2, 2), 1.0])
    yield Case("rank above the width", [*arguments(3, 2, 5, 1), 10.0])
    yield Case("three dimensions", [*arguments(7, 5, 2, 2, 3), 4.0])
    yield Case("101 → 67, rank 8", [*arguments(67, 101, 8, 13), 16.0])
