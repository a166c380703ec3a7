import torch


class adapters_off:
    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.flags = {}
        for name, module in self.model.named_modules():
            self.flags[name] = module.training, module.__dict__.get("adapter_on")
            if hasattr(module, "adapter_on"):
                module.adapter_on = False
        self.model.eval()

    def __exit__(self, *error):
        for name, module in self.model.named_modules():
            module.training, on = self.flags[name]
            if hasattr(module, "adapter_on"):
                module.adapter_on = on


def log_ratio(model, ids):
    with adapters_off(model), torch.no_grad():
        old = model(ids)
    new = model(ids)
    total = 0
    for i in range(ids.shape[1] - 1):
        row, token = torch.arange(len(ids)), ids[:, i + 1]
        total = total + new[:, i].log_softmax(-1)[row, token] - old[:, i].log_softmax(-1)[row, token]
    return total
