import torch


def chat_labels(turns, heads, end, limit):
    rows = [torch.zeros(2, 0, dtype=torch.long)]
    for role, tokens in turns:
        row = torch.tensor(heads[role] + tokens + [end]).repeat(2, 1)
        row[1, : len(heads[role]) if role == "assistant" else None] = -100
        rows.append(row)
    ids, labels = torch.cat(rows, 1)[:, :limit]
    return ids, labels
