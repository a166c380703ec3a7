"""The environment variables that choose among an op's backends and CPU levels, and the values that they may have.

Without torch, so that the command line can check them before it imports anything large.
"""

import os

from finetune.errors import UserError

BACKENDS = ("reference", "cpp", "triton", "cuda")
EMULATIONS = (
    "emulated",
    "checked",
    "sanitized",
)  # builds of the CUDA kernels for the CPU: finetune/kernels/emulator.py
# Ascending; csrc/cpu/dispatch.cpp. avx512vnni: AVX-512 with VNNI and BF16 (AMD from Zen 4 on; Intel has AMX too).
CPU_LEVELS = ("portable", "avx2", "avx512", "avx512vnni", "amx")

CHOICES = {"FINETUNE_BACKEND": BACKENDS + EMULATIONS, "FINETUNE_CPU": CPU_LEVELS}


def choice(variable: str) -> str | None:
    """The value of one of `CHOICES`, None if it is unset or empty. UserError for a value that is not among them."""
    value = os.environ.get(variable) or None
    if value is not None and value not in CHOICES[variable]:
        raise UserError(f"{variable}={value}: expected {', '.join(CHOICES[variable])}")
    return value
