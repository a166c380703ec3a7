"""Penalties for tokens that were there before.

penalized(logits, prompts, outputs, repetition, presence, frequency): logits (b, v) floating point; prompts, outputs:
for every row a list of token ids, maybe empty, maybe with the same id more than once; three floats → (b, v).
First `repetition`, once for every token that is in the row's prompt or output: a logit > 0 is divided by it, any other
is multiplied by it. Then, for the tokens of the output alone, frequency times how often the token is there and
presence (once) are subtracted.

    >>> penalized(torch.tensor([[2.0, -2.0, 1.0]]), [[0, 1]], [[2, 2]], repetition=2.0, presence=0.5, frequency=0.1)
    tensor([[ 1.0000, -4.0000, -0.2000]])
"""

import torch
from torch import Tensor


def penalized(
    logits: Tensor,
    prompts: list[list[int]],
    outputs: list[list[int]],
    repetition: float,
    presence: float,
    frequency: float,
) -> Tensor:
    said, counts = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        said[row, prompt + output] = True
        counts[row] = torch.tensor(output, dtype=torch.int64).bincount(minlength=logits.shape[1])
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(said, repeated, logits)
    return logits - frequency * counts - presence * (counts > 0)
