import torch


def reward_loss(chosen, rejected, chosen_lengths, rejected_lengths, margins):
    rows = range(len(chosen))
    better = torch.stack([chosen[i, chosen_lengths[i] - 1] for i in rows])
    worse = torch.stack([rejected[i, rejected_lengths[i] - 1] for i in rows])
    losses = torch.logaddexp(worse + margins - better, torch.zeros_like(better))
    return losses.sum() / len(losses), (better > worse).sum() / len(losses)
