import torch


def route(logits, k, capacity):
    n, e = logits.shape
    rows = logits.tolist()
    experts = [sorted(range(e), key=lambda i, row=row: (-row[i], i))[:k] for row in rows]
    picked = logits.gather(1, torch.tensor(experts))
    weights = (picked - picked.logsumexp(1, keepdim=True)).exp()
    given, slots, loads = [0] * e, [[-1] * k for _ in range(n)], [0] * e
    for j in range(k):
        for i in range(n):
            expert = experts[i][j]
            loads[expert] += 1
            if given[expert] < capacity:
                slots[i][j] = given[expert]
                given[expert] += 1
            else:
                weights[i, j] = 0
    p = torch.softmax(logits, 1).mean(0)
    return torch.tensor(experts), weights, torch.tensor(slots), e * (torch.tensor(loads).to(p) / (n * k)) @ p
