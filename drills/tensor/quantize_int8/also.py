import torch


def quantize(weight):
    codes, scales = [], []
    for row in weight.to(torch.float32):
        largest = max(row.max().item(), -row.min().item())
        scale = largest / 127 if largest else 1.0
        codes.append(torch.round(row / scale).to(torch.int8))
        scales.append(scale)
    return torch.stack(codes), torch.tensor(scales)


def linear(x, codes, scales):
    weight = torch.einsum("oi,o->oi", codes.float(), scales)
    return torch.nn.functional.linear(x, weight)
