"""What a result is called: reached, missed or nothing; and how its standard error is shown and kept."""

import importlib.util
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from finetune.runs import config, display
from finetune.runs.run import NotFinite, Run


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", config.Config(), console=Console(file=io.StringIO(), width=110))


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({"value": 2.0}, None),
        ({"value": 2.0, "baseline": 1.0}, None),
        ({"value": 1.0, "baseline": 1.0}, None),
        ({"value": 0.5, "baseline": 1.0}, None),
        ({"value": 2.0, "baseline": 1.0, "target": 2.0}, True),
        ({"value": 2.0, "baseline": 2.0, "target": 1.0}, True),
        ({"value": 1.0, "baseline": 1.0, "target": 1.0}, False),
        ({"value": 1.0, "baseline": 2.0, "target": 2.0, "higher": False}, True),
        ({"value": 3.0, "target": 2.0, "higher": False}, False),
    ],
)
def test_only_a_target_is_reached_or_missed(run, given, passed):
    """Better or worse than a baseline, or equal to it, is for the reader to see; equal to a target that is the
    baseline is no gain."""
    run.result("x", **given)
    assert run.judged["x"]["passed"] is passed
    summary = run.summary({})
    assert summary["reached"] == {"x": passed}
    assert summary["passed"] is passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_no_result(run, value):
    with pytest.raises(NotFinite, match=f"x is {value}"):
        run.result("x", value, target=2.0)


def test_the_table_says_neither_reached_nor_missed_without_a_target(run):
    run.result("as_before", 0.0, baseline=0.0)
    run.result("better", 2.0, baseline=1.0, error=0.25)
    run.result("good", 2.0, target=1.0)
    run.result("bad", 0.5, target=1.0)
    text = shown(run)
    assert text["as_before"] == ["0", "0", "–", "equal"]
    assert text["better"] == ["2.00", "±", "0.25", "1", "–", "–"]
    assert text["good"] == ["2", "–", "≥", "1", "reached"]
    assert text["bad"] == ["0.5", "–", "≥", "1", "missed"]


def shown(run):
    summary = run.summary({"unjudged": 3})
    display.closing(run.console, summary, run.judged, run.dir)
    lines = run.console.file.getvalue().splitlines()
    return {words[0]: words[1:] for line in lines if (words := line.split())}


def test_a_standard_error_is_kept_and_an_unknown_one_is_not(run):
    run.result("mean", 3.0, error=0.5)
    run.result("one sample", 3.0, error=math.nan)
    run.result("exact", 3.0)
    assert run.summary({})["standard_error"] == {"mean": 0.5}


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.12345, 0.00412, "0.1235 ± 0.0041"),
        (483.21, 12.4, "483 ± 12"),
        (483.21, 124.0, "483 ± 124"),
        (1.5, 0.0, "1.5 ± 0"),
        (0.75, None, "0.75"),
        (0.75, math.nan, "0.75"),
        (2.0, 1e-9, "2 ± 1e-09"),
        (-0.002, 0.96, "-0.00 ± 0.96"),
    ],
)
def test_value_and_error_end_at_the_same_digit(value, error, text):
    assert display.uncertain(value, error) == text


def test_the_readme_shows_the_standard_errors(tmp_path):
    path = Path(__file__).parents[2] / "scripts/readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    result = Run(tmp_path / "run", config.Config(), console=Console(file=io.StringIO()))
    result.result("mean", 2.0, error=0.25, target=1.0)
    (tmp_path / "summary.json").write_text(json.dumps({"module": "x"} | result.summary({"exact": 3.0})))
    settings = {"machine": {"cpu": "a CPU"}, "config": {"threads": 1}, "versions": {"python": "3"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    shown = readme.measured(tmp_path)
    assert "mean" in shown
    assert "2.00 ± 0.25" in shown


def test_checks_are_not_in_the_table_unless_they_break_their_bound(run):
    run.result("good", 2.0, target=1.0)
    run.check("exact", 1e-12, at_most=1e-9)
    run.check("z", 1.5, error=0.5)  # recorded only
    text = shown(run)
    assert "exact" not in text
    assert text["1"][:5] == ["of", "1", "checks", "hold", "(`checks`"]
    summary = run.summary({})
    assert summary["checks"]["z"] == {"value": 1.5, "error": 0.5, "passed": True}
    assert summary["passed"] is True
    run.check("control", 0.3, at_least=0.5)
    assert "control" not in run.summary({})["metrics"]
    assert run.summary({})["passed"] is False
    display.closing(run.console, run.summary({}), run.judged, run.dir)
    assert "check failed: control is 0.3, must be at least 0.5" in run.console.file.getvalue()
    with pytest.raises(NotFinite, match="z is nan"):
        run.check("z", math.nan)
