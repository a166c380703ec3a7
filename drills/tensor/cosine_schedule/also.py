import torch


def cosine_schedule(step, warmup, total, peak, floor):
    if step < warmup:
        return float(torch.linspace(0, peak, warmup + 2, dtype=torch.float64)[step + 1])
    done = min((step - warmup) / (total - warmup), 1.0)
    share = torch.cos(torch.tensor(done, dtype=torch.float64) * torch.pi / 2).square().item()
    return share * peak + (1 - share) * floor
