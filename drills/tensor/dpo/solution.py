"""The loss of DPO, from logits.

sequence_logps(logits, labels): logits (b, t, v) floating point, labels (b, t) int64, −100 where a token does not count
→ (b,): the sum of the log probabilities of the labels that count. The logits at i predict the label i + 1.
dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta): four of these sums (b,) → (loss, rewards).
The reward of an answer is beta times what the policy's sum exceeds the reference's by; rewards (2, b) holds those of
chosen, then of rejected, without a graph. loss: the mean over the pairs of −log σ(reward of chosen − reward of
rejected), finite for differences of ±1e4. Its gradient goes into the policy only, whatever the reference requires.

    >>> sequence_logps(torch.zeros(1, 3, 2), torch.tensor([[0, -100, 1]]))
    tensor([-0.6931])
    >>> dpo_loss(*torch.tensor([[-1.0], [-2.0], [-2.0], [-1.0]]), beta=0.5)
    (tensor(0.3133), tensor([[ 0.5000],
            [-0.5000]]))
"""

import torch
from torch import Tensor


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:]
    counts = targets != -100
    logs = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
    return (logs * counts).sum(1)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    better = beta * (chosen - reference_chosen.detach())
    worse = beta * (rejected - reference_rejected.detach())
    loss = -torch.nn.functional.logsigmoid(better - worse).mean()
    return loss, torch.stack([better, worse]).detach()
