"""Tokens and labels of a conversation for supervised fine-tuning.

turns: a list of (role, tokens), where role is "system", "user" or "assistant" and tokens a list of ids without special
tokens, maybe empty. heads: {role: list of ids that open a turn of this role}. end: the id that closes every turn.
→ (ids, labels), int64 tensors (n,): ids are the head, the tokens and the end of every turn, one turn after another, and
of them the first `limit`. labels holds the id of every token that the model must learn to say: the tokens of all
assistant turns and their end, but not their heads, which are given when it generates. It is −100 elsewhere. labels[i]
belongs to ids[i]: the loss shifts them later.

    >>> heads = {"user": [1], "assistant": [2, 3]}
    >>> chat_labels([("user", [7]), ("assistant", [8, 9])], heads, end=0, limit=6)
    (tensor([1, 7, 0, 2, 3, 8]), tensor([-100, -100, -100, -100, -100,    8]))
"""

import torch
from torch import Tensor


def chat_labels(
    turns: list[tuple[str, list[int]]], heads: dict[str, list[int]], end: int, limit: int
) -> tuple[Tensor, Tensor]:
    ids: list[int] = []
    labels: list[int] = []
    for role, tokens in turns:
        head, said = heads[role], [*tokens, end]
        ids += head + said
        labels += [-100] * len(head)
        labels += said if role == "assistant" else [-100] * len(said)
    return torch.tensor(ids[:limit], dtype=torch.int64), torch.tensor(labels[:limit], dtype=torch.int64)
