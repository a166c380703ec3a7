import torch

from finetune.drills.cases import Case


def layers(x, w):
    for _ in range(3):
        x = torch.tanh(x @ w) + x
    return x


def dropout(x, w):
    return torch.tanh(x @ w) * (torch.rand(x.shape) < 0.5)


def weight_only(x, w):
    return w.exp().square()


def drive(code, x, w, f, needs=(True, True), dy=None):
    """The result, the gradients by the inputs that need one, how often f was called, and what was kept."""
    calls = []

    def counted(x, w):
        calls.append(len(calls))
        return f(x, w)

    x, w = (t.clone().requires_grad_(need) for t, need in zip((x, w), needs, strict=True))
    torch.manual_seed(0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = code.checkpoint(counted, x, w)
    found = {"result": y.detach(), "calls of f in the forward pass": len(calls)}
    wanted = [t for t in (x, w) if t.requires_grad]
    before = torch.rand(3)  # something else draws numbers between the passes
    grads = torch.autograd.grad(y, wanted, torch.ones_like(y) if dy is None else dy, allow_unused=True)
    return found | {
        "gradients": [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)],
        "calls of f in all": len(calls),
        "more than the args kept": sum(kept) > x.numel() + w.numel(),
        "numbers drawn before and after the backward pass": torch.cat([before, torch.rand(3)]).to(x.dtype),
    }


def reference(x, w, f, needs=(True, True), dy=None):
    x, w = (t.clone().requires_grad_(need) for t, need in zip((x, w), needs, strict=True))
    torch.manual_seed(0)
    y = f(x, w)
    wanted = [t for t in (x, w) if t.requires_grad]
    grads = torch.autograd.grad(y, wanted, torch.ones_like(y) if dy is None else dy, allow_unused=True)
    return {
        "result": y.detach(),
        "calls of f in the forward pass": 1,
        "gradients": [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)],
        "calls of f in all": 2,
        "more than the args kept": False,
        "numbers drawn before and after the backward pass": torch.rand(6).to(x.dtype),
    }


def cases(draw):
    yield Case("one number", [draw.normal(1, 1), draw.normal(1, 1), layers], length=100)
    yield Case("two rows of three", [draw.normal(2, 3), draw.normal(3, 3), layers], length=100)
    yield Case("only x needs a gradient", [draw.normal(2, 3), draw.normal(3, 3), layers, (True, False)], length=100)
    yield Case("only w needs a gradient", [draw.normal(2, 3), draw.normal(3, 3), layers, (False, True)], length=100)
    weighed = [draw.normal(2, 3), draw.normal(3, 3), layers, (True, True), draw.normal(2, 3)]
    yield Case("a gradient that is not 1", weighed, length=100)
    yield Case("f ignores x", [draw.normal(2, 3), draw.normal(3, 3), weight_only], length=100)
    yield Case("dropout", [draw.normal(5, 4), draw.normal(4, 4), dropout], length=100)
    yield Case("larger", [draw.normal(17, 16), draw.normal(16, 16, scale=0.3), layers], length=500)
