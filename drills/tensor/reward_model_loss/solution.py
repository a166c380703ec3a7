"""The loss of a reward model from pairs of answers.

chosen (b, t) and rejected (b, u), floating point: a score for every token, padding at the end included; t and u may
differ. chosen_lengths, rejected_lengths (b,) int64, at least 1: the number of tokens before the padding; margins (b,).
The reward of an answer is the score at its last token. → (loss, accuracy), two scalars:
loss: the mean over the pairs of −log σ(reward of chosen − reward of rejected − margin), finite for differences of ±1e4;
accuracy: the share of pairs whose chosen reward is greater than the rejected one, margins aside; a tie is not right.

    >>> chosen, rejected = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[1.0, 9.0]])
    >>> reward_loss(chosen, rejected, torch.tensor([2]), torch.tensor([1]), torch.tensor([0.0]))
    (tensor(0.6931), tensor(0.))
"""

import torch
from torch import Tensor


def reward_loss(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, margins: Tensor
) -> tuple[Tensor, Tensor]:
    better = chosen.gather(1, chosen_lengths[:, None] - 1)[:, 0]
    worse = rejected.gather(1, rejected_lengths[:, None] - 1)[:, 0]
    loss = -torch.nn.functional.logsigmoid(better - worse - margins).mean()
    return loss, (better > worse).to(chosen.dtype).mean()
