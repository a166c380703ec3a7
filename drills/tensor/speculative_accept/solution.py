"""The acceptance rule of speculative decoding.

accept(drafted, draft, target, uniforms): drafted is a list of k tokens that the draft model has drawn; draft (k, v) the
probabilities that it drew them from; target (k + 1, v) the probabilities of the target model at the same places and at
the one after them; uniforms a list of k + 1 numbers in [0, 1) → the list of tokens that are put out, ints.
Token i is accepted if uniforms[i] < target[i, token] / draft[i, token]; it and those before it are put out. At the
first one that is not accepted, a token is drawn from max(target[i] − draft[i], 0), divided by its sum, and ends the
list. If all are accepted, one more is drawn from target[k].
To draw from probabilities with the last number of uniforms, take the first token whose cumulative sum exceeds it (the
last token with a probability above 0, if rounding lets none exceed it).

    >>> draft, target = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    >>> accept([0], draft, target, [0.4, 0.9]), accept([0], draft, target, [0.6, 0.9])
    ([0, 0], [1])
"""

from torch import Tensor


def accept(drafted: list[int], draft: Tensor, target: Tensor, uniforms: list[float]) -> list[int]:
    for i, token in enumerate(drafted):
        if uniforms[i] * float(draft[i, token]) >= float(target[i, token]):
            residual = (target[i] - draft[i]).clamp(min=0)
            return [*drafted[:i], sample(residual / residual.sum(), uniforms[-1])]
    return [*drafted, sample(target[len(drafted)], uniforms[-1])]


def sample(probabilities: Tensor, uniform: float) -> int:
    exceeds = (probabilities.cumsum(0) > uniform).nonzero()
    return int(exceeds[0]) if len(exceeds) else int(probabilities.nonzero()[-1])
