"""Shared by all tests: markers skip what this machine lacks, with the reason."""

import importlib.util

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    peers = all(importlib.util.find_spec(name) for name in ("transformers", "peft", "trl"))
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if "peer" in item.keywords and not peers:
            item.add_marker(pytest.mark.skip(reason="needs the peers extra: pip install -e '.[peers]'"))
