import torch
import torch.nn.functional as F


def sequence_logps(logits, labels):
    b, t, v = logits.shape
    losses = F.cross_entropy(
        logits[:, : t - 1].reshape(-1, v), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="none"
    )
    return -losses.view(b, t - 1).sum(-1)


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    margin = (chosen - rejected) - (reference_chosen - reference_rejected).detach()
    with torch.no_grad():
        rewards = torch.stack([chosen - reference_chosen, rejected - reference_rejected]) * beta
    return F.softplus(-beta * margin, threshold=80).sum() / len(chosen), rewards
