"""Find the bug: training stops with a row that is too long for the model.

fit(prompt, answer, end, limit): lists of token ids; limit ≥ 1 → (ids, labels), two lists of the same length, at most
`limit`. ids is prompt, answer and end. If they are longer than `limit`, the start of the prompt is cut off; if the
prompt is gone and it is still too long, the end of the answer (with it the token end) is cut off too. labels is ids
where the answer and end are, −100 where the prompt is.

    >>> fit([1, 2, 3], [4, 5], end=0, limit=5)
    ([2, 3, 4, 5, 0], [-100, -100, 4, 5, 0])
    >>> fit([1, 2, 3], [4, 5], end=0, limit=3)
    ([4, 5, 0], [4, 5, 0])
"""


def fit(prompt: list[int], answer: list[int], end: int, limit: int) -> tuple[list[int], list[int]]:
    answer = [*answer, end][:limit]
    room = limit - len(answer)
    kept = prompt[max(len(prompt) - room, 0) :]
    return kept + answer, [-100] * len(kept) + answer
