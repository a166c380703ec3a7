import torch

from finetune.drills.cases import Case, gradients


def drive(code, logp, old_logp, advantages, mask, low, high):
    leaves = [x.clone().requires_grad_() for x in (logp, old_logp, advantages)]
    loss, clipped = code.ppo_loss(*leaves, mask, low, high)
    of_logp, *others = gradients(loss, *leaves)
    found = {"loss": loss.detach(), "clipped": float(clipped), "gradient of logp": of_logp}
    return found | {"gradient of old_logp": others[0], "gradient of advantages": others[1]}


def cases(draw):
    def arguments(*shape, scale=0.3, share=1.0, low=0.2, high=0.2):
        old = draw.normal(*shape) - 3
        logp = old + draw.normal(*shape, scale=scale)
        return [logp, old, draw.normal(*shape), draw.flags(*shape, share=share), low, high]

    def one(difference, advantage, low=0.2, high=0.2):
        full = torch.full((1, 1), difference), torch.zeros(1, 1), torch.full((1, 1), advantage)
        return [*full, torch.ones(1, 1, dtype=torch.bool), low, high]

    yield Case("one token, old and new equal", one(0.0, 1.0))
    yield Case("more probable, A > 0: held back", one(0.5, 2.0))
    yield Case("more probable, A < 0: not held back", one(0.5, -2.0))
    yield Case("less probable, A > 0: not held back", one(-0.5, 2.0))
    yield Case("less probable, A < 0: held back", one(-0.5, -2.0))
    yield Case("between low and high", one(0.25, 1.0, 0.1, 0.4))
    yield Case("no advantage", one(0.5, 0.0))
    yield Case("two rows", arguments(2, 3))
    yield Case("a mask", arguments(2, 5, share=0.5))
    mask = torch.tensor([[True, False, False, False], [True, True, True, False]])
    yield Case("answers of unlike length", [*arguments(2, 4)[:3], mask, 0.2, 0.28])
    yield Case("an empty mask", arguments(2, 3, share=0.0))
    padded = arguments(2, 3)
    padded[3][0, 2] = padded[3][1, 1] = False
    padded[0][0, 2], padded[1][0, 2], padded[2][1, 1] = -torch.inf, -torch.inf, torch.nan
    yield Case("−inf and NaN outside the mask", padded)
    yield Case("7 rows of 61", arguments(7, 61, share=0.7, low=0.2, high=0.28), length=300)
