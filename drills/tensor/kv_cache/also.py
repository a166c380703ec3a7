import torch


class KVCache:
    def __init__(self, batch, heads, capacity, d):
        self.capacity = capacity
        self.rows = [(torch.zeros(heads, 0, d), torch.zeros(heads, 0, d)) for _ in range(batch)]

    def positions(self, t):
        return torch.tensor([[k.shape[1] + i for i in range(t)] for k, _ in self.rows])

    def append(self, k, v, counts):
        rows = [
            (torch.cat([old_k, k[b, :, :n]], 1), torch.cat([old_v, v[b, :, :n]], 1))
            for b, ((old_k, old_v), n) in enumerate(zip(self.rows, counts.tolist(), strict=True))
        ]
        if any(row.shape[1] > self.capacity for row, _ in rows):
            raise ValueError("full")
        self.rows = rows

    def attend(self, q):
        return torch.stack(
            [torch.softmax(x @ k.mT * x.shape[-1] ** -0.5, -1) @ v for x, (k, v) in zip(q, self.rows, strict=True)]
        )
