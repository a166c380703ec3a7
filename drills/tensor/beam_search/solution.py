"""Beam search with a length penalty.

step(tokens), tokens a list of ids that begins with `start` → log probabilities of the next token, (v,) tensor.
beam_search(step, start, end, width, steps, alpha) → (tokens, score).
The first live sequence is [start], with sum 0. In each of at most `steps` steps every live sequence is extended by
every token, and its sum by the token's log probability. Of all extensions together the `width` with the greatest sums
survive (all, if they are fewer). Survivors that end in `end` are finished; the others are the live sequences of the
next step. The search stops when none is live.
The score of a sequence is its sum / (number of tokens after start, end included) ** alpha. The result is the one with
the greatest score among all finished sequences and those that are live at the end: its tokens without start (with end,
if it has it), a list, and its score, a float. Equal sums do not occur, nor do log probabilities of −inf.

    >>> table = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.9, 0.05, 0.05]]).log()
    >>> tokens, score = beam_search(lambda tokens: table[tokens[-1]], start=2, end=0, width=2, steps=4, alpha=0.0)
    >>> tokens, round(score, 4)
    ([0], -0.1054)
"""

from collections.abc import Callable

from torch import Tensor


def beam_search(
    step: Callable[[list[int]], Tensor], start: int, end: int, width: int, steps: int, alpha: float
) -> tuple[list[int], float]:
    live: list[tuple[float, list[int]]] = [(0.0, [start])]
    finished: list[tuple[float, list[int]]] = []
    for _ in range(steps):
        extended = [
            (total + logp, [*tokens, token])
            for total, tokens in live
            for token, logp in enumerate(step(tokens).tolist())
        ]
        extended.sort(key=lambda each: -each[0])
        survivors = extended[:width]
        finished += [each for each in survivors if each[1][-1] == end]
        live = [each for each in survivors if each[1][-1] != end]
        if not live:
            break
    scored = [(total / (len(tokens) - 1) ** alpha, tokens[1:]) for total, tokens in finished + live]
    score, tokens = max(scored, key=lambda each: each[0])
    return tokens, score
