import torch


def sample(velocity, noise, labels, null, scale, steps, shift):
    def moved(i):
        t = 1 - i / steps
        return shift * t / (1 + (shift - 1) * t)

    x = noise.clone()
    both = torch.cat([labels, torch.full_like(labels, null)])
    for i in range(steps):
        t = torch.full((2 * len(x),), moved(i), dtype=x.dtype)
        v, u = velocity(x.repeat(2, 1), t, both).chunk(2)
        x = x - (moved(i) - moved(i + 1)) * (scale * v + (1 - scale) * u)
    return x
