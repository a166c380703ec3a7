"""`python scripts/export_interview_briefs.py [--out DIR]`: every module's brief, in both languages, as Markdown."""

import sys

from finetune.cli import main

if __name__ == "__main__":
    words = sys.argv[1:] if "--out" in sys.argv else ["--out", "output/interview_briefs", *sys.argv[1:]]
    sys.exit(max(main(["brief", "--all", "--lang", lang, *words]) for lang in ("en", "zh")))
