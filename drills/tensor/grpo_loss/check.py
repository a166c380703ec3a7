import torch

from finetune.drills.cases import Case, gradients


def drive(code, logp, old_logp, reference_logp, advantages, mask, beta, low, high):
    """The whole batch, then its first row and the rest as micro-batches."""
    tokens = max(int(mask.sum()), 1)
    leaves = [x.clone().requires_grad_() for x in (logp, old_logp, reference_logp, advantages)]
    loss = code.grpo_loss(*leaves, mask, beta, low, high, tokens)
    names = "logp", "old_logp", "reference_logp", "advantages"
    found = {"loss": loss.detach()}
    found |= {f"gradient of {n}": g for n, g in zip(names, gradients(loss, *leaves), strict=True)}
    for name, rows in (("first row", slice(0, 1)), ("other rows", slice(1, None))):
        if len(logp[rows]):
            rows_of = [x[rows] for x in (logp, old_logp, reference_logp, advantages, mask)]
            found[f"loss of the {name}"] = code.grpo_loss(*rows_of, beta, low, high, tokens)
    return found


def cases(draw):
    def arguments(b, t, share=1.0, beta=0.0, low=0.2, high=0.2, scale=0.3):
        old = draw.normal(b, t) - 3
        near = [old + draw.normal(b, t, scale=scale) for _ in range(2)]
        return [near[0], old, near[1], draw.normal(b), draw.flags(b, t, share=share), beta, low, high]

    def one(difference, reference, advantage, beta):
        zeros = torch.zeros(1, 1)
        values = [zeros + difference, zeros, zeros + reference, torch.tensor([advantage])]
        return [*values, torch.ones(1, 1, dtype=torch.bool), beta, 0.2, 0.2]

    yield Case("one token", one(0.0, 0.0, 1.0, 0.0))
    yield Case("one token, held back by the clip", one(0.5, 0.0, 1.0, 0.0))
    yield Case("one token, A < 0, beyond the bound", one(0.5, 0.0, -1.0, 0.0))
    yield Case("one token, no advantage, KL", one(0.5, 0.0, 0.0, 0.5))
    unlike = arguments(2, 3)
    unlike[4] = torch.tensor([[True] * 3, [True, False, False]])
    yield Case("two rows, one of one token", unlike)
    yield Case("beta 0.1", arguments(2, 3, beta=0.1))
    yield Case("high 0.5", arguments(3, 4, high=0.5, scale=0.6))
    yield Case("masks", arguments(3, 5, share=0.5, beta=0.04))
    padded = arguments(2, 3, beta=0.1)
    padded[4][0, 2] = padded[4][1, 1] = False
    padded[0][0, 2], padded[1][0, 2], padded[2][1, 1] = -torch.inf, -torch.inf, torch.nan
    yield Case("−inf and NaN outside the mask", padded)
    empty = arguments(2, 2, beta=0.1)
    empty[4][0] = False
    yield Case("an answer without tokens", empty)
    yield Case("7 rows of 61", arguments(7, 61, share=0.7, beta=0.04, high=0.28), length=400)
