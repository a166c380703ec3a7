"""Every module's interview.toml: its schema, both languages alike, and no number that is not one of the run's."""

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = sorted((Path(__file__).parents[1] / "modules").glob("*/*/*/interview.toml"))
NUMBER = r"\d+(?:[.,]\d+)*"


def fields(text):
    return sorted(re.findall(r"\{([a-z_0-9.]+)\}", text))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.parent.name)
def test_schema(file):
    found = tomllib.loads(file.read_text(encoding="utf-8"))
    assert set(found) == {"brief", "place", "questions"}
    assert set(found["brief"]) == set(found["place"]) == {"en", "zh"}
    assert len(found["questions"]) >= 8
    levels = [question["level"] for question in found["questions"]]
    assert levels == sorted(levels)
    assert levels[0] == 1
    assert levels[-1] == 5
    for question in found["questions"]:
        assert set(question) == {"level", "reference", "en", "zh"}
        assert question["reference"].startswith("https://")
        en, zh = question["en"], question["zh"]
        assert set(en) == set(zh) == {"question", "points", "wrong", "follow_up"}
        assert len(en["points"]) == len(zh["points"]) >= 3
        for mine, theirs in zip(en["points"], zh["points"], strict=True):
            assert sorted(re.findall(NUMBER, mine)) == sorted(re.findall(NUMBER, theirs)), (mine, theirs)
        assert all(re.search(r"[\u4e00-\u9fff]", zh[key]) for key in ("question", "wrong", "follow_up"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.parent.name)
def test_brief_is_a_template_over_the_runs_numbers(file):
    brief = tomllib.loads(file.read_text(encoding="utf-8"))["brief"]
    assert fields(brief["en"]) == fields(brief["zh"])
    assert len(fields(brief["en"])) >= 3
    for text in brief.values():
        rest = re.sub(r"\{[a-z_0-9.]+\}|(?:fp|bf)\d+", "", text)  # fields, and formats: bf16 is a name
        assert not re.search(NUMBER, rest), "a number in a brief must be one of the run's"
    words = len(brief["en"].split())
    assert 120 <= words <= 420, f"{words} words are not spoken in 60 to 180 seconds"
