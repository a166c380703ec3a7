"""`--toy` of every module reaches its own targets whatever the seed. Seed 0 is run by the tests of each module."""

import dataclasses

import pytest

from finetune.runs import registry
from finetune.runs.run import Run, execute

LIGHT = ("gae", "advantage", "mdp", "policy_gradient")  # ten seconds or so: two more seeds in the default tests
FIRST, SEEDS = (100, 101), range(100, 112)
REST = [(info.name, seed) for info in registry.modules() for seed in SEEDS if (info.name, seed) not in
        {(name, seed) for name in LIGHT for seed in FIRST}]  # fmt: skip


def reaches(name, seed, folder, monkeypatch):
    monkeypatch.setattr(Run, "curves", lambda self: None)  # the picture takes longer than some runs
    info = registry.find(name)
    config = dataclasses.replace(registry.load(info).Config.toy(), seed=seed, threads=1)
    summary = execute(info, config, folder, toy=True)
    missed = {
        result: (summary["metrics"][result], summary["standard_error"].get(result), summary["target"][result])
        for result, reached in summary["reached"].items()
        if reached is False
    }
    assert summary["passed"] is True, missed


@pytest.mark.slow
@pytest.mark.parametrize("seed", FIRST)
@pytest.mark.parametrize("name", LIGHT)
def test_a_light_toy_reaches_its_targets(name, seed, tmp_path, monkeypatch):
    reaches(name, seed, tmp_path / "run", monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize(("name", "seed"), REST)
def test_every_toy_reaches_its_targets(name, seed, tmp_path, monkeypatch):
    reaches(name, seed, tmp_path / "run", monkeypatch)
