import torch


def policy_loss(logits, legal, actions, advantages, bonus):
    losses = []
    for row in range(len(logits)):
        allowed = logits[row][legal[row]]
        index = legal[row, : actions[row]].sum()
        p, logs = allowed.softmax(0), allowed - allowed.max() - (allowed - allowed.max()).logsumexp(0)
        losses.append(-advantages[row] * logs[index] + bonus * torch.dot(p, logs))
    return torch.stack(losses).mean()
