import torch


def gae(rewards, values, next_values, terminated, truncated, gamma, lam):
    delta = rewards + gamma * (~terminated).to(values.dtype) * next_values - values
    stop = (terminated | truncated).to(values.dtype)
    rows = []
    for i in range(len(rewards)):
        total, weight = torch.zeros_like(delta[i]), torch.ones_like(delta[i])
        for k in range(i, len(rewards)):
            total = total + weight * delta[k]
            weight = weight * gamma * lam * (1 - stop[k])
        rows.append(total)
    advantages = torch.stack(rows)
    return advantages, values + advantages
