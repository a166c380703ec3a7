import torch

from finetune.drills.cases import Case


class Layer(torch.nn.Module):
    def __init__(self, update, on):
        super().__init__()
        self.update, self.adapter_on = torch.nn.Parameter(update), on

    def forward(self, x):
        return x + x @ self.update if self.adapter_on else x


class Toy(torch.nn.Module):
    """Embedding, layers with adapters inside blocks, and a stand-in for dropout that gives the same every time."""

    def __init__(self, table, updates, on, training):
        super().__init__()
        self.table, self.calls, self.graphs = table, [], []
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(Layer(u, o)) for u, o in zip(updates, on, strict=True))
        self.train(training)

    def forward(self, ids):
        self.calls.append((self.training, any(m.adapter_on for m in self.modules() if isinstance(m, Layer))))
        if ids.numel() == 0:
            raise ValueError("no tokens")
        x = self.table[ids]
        for block in self.blocks:
            x = block(x)
            x = x * 0.5 if block[0].training else x
        self.graphs = [*self.graphs, torch.is_grad_enabled()]
        return x @ self.table.T

    def flags(self):
        return [(m.training, getattr(m, "adapter_on", None)) for m in self.modules()]


def drive(code, table, updates, on, training, ids, frozen=False):
    model = Toy(table, updates, on, training)
    if frozen:
        model.blocks[0].eval()
    ratio = code.log_ratio(model, ids)
    found = {"ratio": ratio.detach(), "flags (training, adapter_on) after it": model.flags()}
    found["calls of the model (training, an adapter on)"] = sorted(model.calls)
    found["calls of the model with a graph"] = sum(model.graphs)
    if ratio.requires_grad:
        ratio.sum().backward()
        found["gradient"] = [block[0].update.grad for block in model.blocks if block[0].adapter_on]
    try:
        with code.adapters_off(model):
            found["flags inside"] = model.flags()
            model(ids[:, :0])
    except ValueError:
        found["flags after an exception"] = model.flags()
    return found


def cases(draw):
    def arguments(vocabulary, d, layers, *shape, on=True, training=False):
        updates = [draw.normal(d, d, scale=0.5) for _ in range(layers)]
        ids = draw.integers(vocabulary, *shape)
        return [draw.normal(vocabulary, d), updates, [on] * layers, training, ids]

    yield Case("one layer, two tokens", arguments(3, 2, 1, 1, 2))
    yield Case("three tokens", arguments(3, 2, 1, 2, 3))
    yield Case("in training", arguments(3, 2, 1, 2, 3, training=True))
    yield Case("in training, the first block in eval mode", arguments(3, 2, 2, 2, 3, training=True), {"frozen": True})
    mixed = arguments(3, 2, 2, 2, 3)
    mixed[2] = [True, False]
    yield Case("one adapter on, one off", mixed)
    yield Case("three layers", arguments(11, 7, 3, 3, 5, training=True))
