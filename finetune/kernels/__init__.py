"""The kernel lab: emulator, deliberate faults, static counts, CUDA toolkit, and its commands."""
