"""`--toy` of every module reaches its own targets whatever the seed. Seed 0 is run by the tests of each module."""

import dataclasses

import pytest

from finetune.runs import registry
from finetune.runs.run import Run, execute


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 112))
@pytest.mark.parametrize("name", [info.name for info in registry.modules()])
def test_every_toy_reaches_its_targets(name, seed, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "curves", lambda self: None)  # the picture takes longer than some runs
    info = registry.find(name)
    config = dataclasses.replace(registry.load(info).Config.toy(), seed=seed, threads=1)
    summary = execute(info, config, tmp_path / "run", toy=True)
    missed = {
        result: (summary["metrics"][result], summary["standard_error"].get(result), summary["target"][result])
        for result, reached in summary["reached"].items()
        if reached is False
    }
    assert summary["passed"] is True, missed
