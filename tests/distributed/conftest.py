"""Ranks that all tests of a session share: starting them costs more than most tests."""

import pytest

from finetune.distributed.launch import Ranks


def started(world):
    with Ranks(world) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def two():
    yield from started(2)


@pytest.fixture(scope="session")
def four():
    yield from started(4)
