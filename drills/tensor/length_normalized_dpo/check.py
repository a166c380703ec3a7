import torch

from finetune.drills.cases import Case, gradients


def drive(code, policy, reference, mask, beta, gamma):
    leaves = [x.clone().requires_grad_() for x in (policy, reference)]
    dpo, simpo = code.length_normalized_dpo(*leaves, mask, beta), code.simpo(leaves[0], mask, beta, gamma)
    names = "length_normalized_dpo", "simpo"
    found = {name: loss.detach() for name, loss in zip(names, (dpo, simpo), strict=True)}
    for name, loss in zip(names, (dpo, simpo), strict=True):
        policy_gradient, reference_gradient = gradients(loss, *leaves)
        found[f"gradient of policy in {name}"] = policy_gradient
        found[f"gradient of reference in {name}"] = reference_gradient
    return found


def cases(draw):
    def arguments(b, t, beta=2.0, gamma=0.5, share=1.0):
        policy, reference = draw.normal(2, b, t) - 2, draw.normal(2, b, t) - 2
        return [policy, reference, draw.flags(2, b, t, share=share), beta, gamma]

    yield Case("one pair, one token", arguments(1, 1))
    yield Case("one pair, three tokens", arguments(1, 3))
    unlike = arguments(1, 3)
    unlike[2] = torch.tensor([[[True, True, True]], [[True, False, False]]])
    yield Case("answers of unlike length", unlike)
    yield Case("no margin", arguments(2, 3, gamma=0.0))
    yield Case("gamma 1.5, beta 10", arguments(2, 3, 10.0, 1.5))
    yield Case("masks", arguments(3, 5, share=0.6))
    empty = arguments(2, 3)
    empty[2][0, 0] = False
    yield Case("an answer without tokens", empty)
    padded = arguments(2, 3)
    padded[2][0, 0, 2] = padded[2][1, 1, 1] = False
    padded[0][0, 0, 2], padded[1][0, 0, 2], padded[0][1, 1, 1] = -torch.inf, -torch.inf, torch.nan
    yield Case("−inf and NaN outside the mask", padded)
    yield Case("7 pairs of 31 tokens", arguments(7, 31, share=0.7), length=400)
