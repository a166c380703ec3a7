import torch


def ema(average, weights, step, decay=0.999):
    keep = decay if (1 + step) > decay * (10 + step) else (1 + step) / (10 + step)
    found = {}
    for name in average:
        if weights[name].dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            old = average[name].to(torch.float32)
            found[name] = torch.lerp(old, weights[name].to(old), 1 - keep)
        else:
            found[name] = weights[name].detach().clone()
    return found
