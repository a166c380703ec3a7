"""The process in which a learner's code runs (started by run.py): python -m finetune.drills.child DRILL FILE VERDICT.

Its time and its memory are bounded by the operating system: the time of the processor, so that a busy machine makes no
answer wrong, and after WALL times as long that of the clock, for code that waits. When the time is over, faulthandler
writes where the code was; the verdict goes to a file, since the code may print what it likes.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import signal
import sys
from pathlib import Path

MEMORY = 8 << 30  # bytes of addresses; PyTorch alone takes about two
WALL = 10  # times the seconds of the processor


def main(name: str, answer: str, verdict: str, seconds: float) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # which then ends the process
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(WALL * seconds, exit=True)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch

    from finetune.drills import catalog
    from finetune.drills.judge import Judge

    torch.set_num_threads(1)
    found = Judge(catalog.find(name)).verdict(Path(answer))
    Path(verdict).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
