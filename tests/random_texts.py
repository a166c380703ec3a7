"""Random texts that show where two tokenizers differ."""

import numpy as np

TEXT = (
    "the The THE don't I'M you'll it's we've Größe naïve cafe\u0301 co\u0308 déjà 日本語 テキスト 한국어 русский "
    "עברית हिन्दी ไทย def return x1 fooBar HTTPServer snake_case 3.14 1,000,000 2024-01-31 ½ ²³ ٣٤ 12345678 "
    "http://a.b/c?d=e&f #tag @you 🙂 👍🏽 👨\u200d👩\u200d👧 ﬁ Ǆ ß İ Ω \u200b \u00a0 \ufeff \u2028 \x00 \x07 "
    "\x1b[0m \x7f \ufffd ▁ ▁▁ ▁a Ġ Ċ <0x0A> <unk> <s"
)
WORDS = TEXT.split(" ")
BLANKS = (
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\t",
    "\t\t",
    "\r\n",
    "",
    "",
    "'",
    ".",
    "!?",
    "--",
    " (",
)


def texts(count, special=(), seed=0):
    """`count` texts of up to 12 words, blanks, signs, single characters of all planes and names of special tokens."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        parts = []
        for _ in range(rng.integers(0, 12)):
            kind = rng.random()
            if kind < 0.05 and special:
                parts.append(special[rng.integers(len(special))])
            elif kind < 0.15:
                code = int(rng.integers(1, 0x1F9FF if rng.random() < 0.3 else 0x3000))
                parts.append(chr(code if not 0xD800 <= code < 0xE000 else 0x41))
            elif kind < 0.2:
                parts.append(str(rng.integers(10 ** int(rng.integers(1, 9)))))
            else:
                parts.append(WORDS[rng.integers(len(WORDS))])
            parts.append(BLANKS[rng.integers(len(BLANKS))])
        found.append("".join(parts))
    return found
