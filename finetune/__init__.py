"""finetune: a systems lab for LLM, VLM and RLHF training."""

import os

# GNU OpenMP lets waiting threads spin for milliseconds by default. That gains little on an idle machine, and next to a
# second process with two threads it made a training step 10 to 40 times slower. 1000 spins (some 20 µs) bridge the gaps
# between operators and then give the core away. It is read when torch is loaded, hence here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
