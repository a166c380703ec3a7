"""The seeds on which a toy has to reach its targets: one in the default tests, the others in `long`."""

import pytest

THREE = [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)]
OTHERS = THREE[1:]  # where a fixture runs seed 0
