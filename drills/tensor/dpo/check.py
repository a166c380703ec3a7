import torch

from finetune.drills.cases import Case, gradients


def drive(code, logits, references, labels, beta):
    """logits, references (2, b, t, v), labels (2, b, t): chosen, then rejected."""
    leaves = [x.clone().requires_grad_() for x in (logits, references)]
    sums = [code.sequence_logps(x[i], labels[i]) for x in leaves for i in (0, 1)]
    loss, rewards = code.dpo_loss(*sums, beta)
    of_policy, of_reference = gradients(loss, *leaves)
    found = {"sequence_logps": torch.stack(sums).detach(), "loss": loss.detach(), "rewards": rewards.detach()}
    found["rewards without a graph"] = not rewards.requires_grad
    return found | {"gradient of the policy": of_policy, "gradient of the reference": of_reference}


def cases(draw):
    def arguments(b, t, v, beta=0.1, masked=0.0, scale=1.0):
        labels = draw.integers(v, 2, b, t)
        labels[draw.flags(2, b, t, share=masked)] = -100
        return [draw.normal(2, b, t, v, scale=scale), draw.normal(2, b, t, v, scale=scale), labels, beta]

    yield Case("one pair of two tokens", arguments(1, 2, 2))
    yield Case("three tokens", arguments(1, 3, 3, 0.5))
    answer = arguments(1, 4, 3, 0.5)
    answer[2][0, :, :2], answer[2][1, :, :3] = -100, -100
    yield Case("answers of unlike length", answer)
    same = arguments(2, 3, 3)
    same[1] = same[0].clone()
    yield Case("policy and reference equal", same)
    yield Case("two pairs, masked", arguments(2, 5, 3, masked=0.4))
    yield Case("all labels −100", arguments(1, 3, 3, masked=1.0))
    yield Case("policy and reference far apart", arguments(2, 7, 5, beta=1.0, scale=100))
    yield Case("7 pairs of 31 tokens", arguments(7, 31, 11, masked=0.3), length=400)
