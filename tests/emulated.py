"""Calls the test kernels of tests/fixtures/emulator on the plain or the checked build of the emulator."""

import functools
import re

from finetune.kernels import emulator

FIXTURES = emulator.ROOT / "tests" / "fixtures" / "emulator"


@functools.cache
def library(build):
    return emulator.import_library(f"test_{build}")


def call(kernel, *tensors, build="checked", grid=1, block=64, shared=0, number=0, bug=""):
    """Runs a kernel on pairs (use, tensor), use being in, out or inout; None for an argument it has not."""
    module = library(build)
    given = [(pair[1].data_ptr(), pair[1].nbytes, pair[0]) if pair else (0, 0, "in") for pair in tensors]
    module.set_bug(bug)
    try:
        module.call(kernel, given, grid, block, shared, number)
        return module.bug_reached()
    finally:
        module.set_bug("")


def marked(name):
    """Numbers of the lines of checks.cu or strict.cu that end in `// <- name`."""
    source = "strict.cu" if f"// <- {name}\n" in (FIXTURES / "strict.cu").read_text() else "checks.cu"
    lines = (FIXTURES / source).read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if re.search(rf"// <- {name}( \(.*\))?$", line)]
    assert found, name
    return found
