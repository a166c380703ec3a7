"""Rewards that check an answer: 1 for a right one, 0 for any other.

What a policy is trained on it will exploit, so a verifier fails closed: what it cannot read is wrong, and of several
answers none counts. It must not be too strict either: each right answer that it rejects teaches the policy that a
right answer is wrong.
"""

from __future__ import annotations

import re
from typing import Any

QUESTION = re.compile(r"(?<![\d.])(-?\d{1,18})\s*([+*-])\s*(-?\d{1,18})\s*=\s*$", re.ASCII)
ANSWER = re.compile(r"\s*(-?[0-9]{1,3}(?:,[0-9]{3})+|-?[0-9]{1,20})(?!\w|[.,]\w|[ \t]*[-+*/=^0-9])")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def asked(prompt: str) -> int | None:
    """The result of the sum at the end of a prompt, `a + b =`; None if it ends with no such question."""
    found = QUESTION.search(prompt)
    return found and OPERATIONS[found[2]](int(found[1]), int(found[3]))


def answered(completion: str) -> int | None:
    """The integer with which a completion begins, digits of ASCII only; None if it begins with none, or its line goes
    on as a decimal, a formula or a list of numbers."""
    found = ANSWER.match(completion)
    return found and int(found[1].replace(",", ""))


def right_sum(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1.0 where the completion begins with the result of the sum that its prompt ends with, else 0.0. ValueError for a
    prompt that asks for no sum: then the data are wrong, not the answer."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = asked(prompt)
        if wanted is None:
            raise ValueError(f"the prompt does not end with a sum such as '3 + 4 =': {prompt[-40:]!r}")
        found.append(float(answered(completion) == wanted))
    return found
