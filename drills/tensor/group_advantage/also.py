import torch


def group_advantages(rewards, groups, scale):
    _, index = torch.unique(groups, return_inverse=True)
    same = index[:, None] == index
    size = same.sum(1)
    mean = (same * rewards).sum(1) / size
    square = (same * (rewards - mean[:, None]) ** 2).sum(1) / size
    least = torch.where(same, rewards, torch.inf).amin(1)
    most = torch.where(same, rewards, -torch.inf).amax(1)
    useful = most > least
    difference = (rewards - mean) / square.sqrt() if scale else rewards - mean
    return torch.where(useful, difference, torch.zeros_like(difference)), useful
