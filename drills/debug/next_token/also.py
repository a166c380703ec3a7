import torch


def examples(ids, length):
    starts = range(0, len(ids) - length, length)
    rows = [ids[i : i + length + 1] for i in starts]
    both = torch.stack(rows) if rows else ids.new_zeros(0, length + 1)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def loss(logits, labels):
    logs = torch.log_softmax(logits, -1)
    return -torch.gather(logs, 2, labels.unsqueeze(2)).mean()
