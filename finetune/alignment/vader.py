"""Sentiment of words as people rated it: the lexicon of VADER (Hutto & Gilbert 2014, ICWSM), from its wheel.

Ten people rated each of 7,500 words and emoticons from −4 (very negative) to 4; the lexicon holds the mean. The score
of a text here is the sum over its words, without VADER's rules for negation and emphasis: a reward that everybody can
check by hand, that a 135 M model can learn in minutes, and that is easily exploited ("love love love").
"""

from __future__ import annotations

import functools
import re

from finetune.runs import wheels
from finetune.runs.wheels import Wheel

WHEEL = Wheel(  # MIT license
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2-py2.py3-none-any.whl",
    125_950,
    "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311",
)
MEMBER = "vaderSentiment/vader_lexicon.txt"
WORD = re.compile(r"[a-z']+")


@functools.cache
def lexicon() -> dict[str, float]:
    """Word (lower case) → mean rating. Fetched once; UserError if the package index is out of reach."""
    found = {}
    for line in wheels.member(WHEEL, MEMBER).decode("utf-8").splitlines():
        word, mean, *_ = line.split("\t")
        if WORD.fullmatch(word):  # no emoticons: the text is cut into words
            found[word] = float(mean)
    return found


def score(text: str) -> float:
    """The sum of the ratings of the words of a text."""
    known = lexicon()
    return sum(known.get(word.strip("'"), 0.0) for word in WORD.findall(text.lower()))
