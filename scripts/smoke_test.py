"""`python scripts/smoke_test.py [--modules sft,mdp]`: every module's toy setting; a report in output/smoke_reports/."""

import sys

from finetune.cli import main

if __name__ == "__main__":
    sys.exit(main(["smoke", *sys.argv[1:]]))
