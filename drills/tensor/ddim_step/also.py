import torch


def step(x, epsilon, signal, t, s, eta, noise, clip):
    a = signal[t]
    b = torch.cat([signal, signal.new_ones(1)])[s]
    clean = x / a**0.5 - epsilon * (1 / a - 1) ** 0.5
    if clip is not None:
        clean = torch.clip(clean, -clip, clip)
        epsilon = (x / a**0.5 - clean) / (1 / a - 1) ** 0.5
    variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
    mean = b**0.5 * clean + (1 - b - variance) ** 0.5 * epsilon
    return mean + variance**0.5 * noise
