"""`python scripts/interview_brief.py --module sft [...]`: `python -m finetune brief sft [...]`."""

import sys

from finetune.cli import main

if __name__ == "__main__":
    words = sys.argv[1:]
    if "--module" in words[:-1]:
        at = words.index("--module")
        words[at : at + 2] = [words[at + 1]]
    sys.exit(main(["brief", *words]))
