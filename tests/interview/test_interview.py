"""Every module's interview.toml: its schema, both languages alike, and no number that is not one of the run's."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from finetune.interview import brief, content
from finetune.runs import registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "modules").glob("*/*/*/interview.toml"))
NUMBER = r"\d+(?:[.,]\d+)*"


def fields(text):
    return sorted(re.findall(r"\{([a-z_0-9.]+)\}", text))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.parent.name)
def test_schema(file):
    found = tomllib.loads(file.read_text(encoding="utf-8"))
    assert set(found) == {"brief", "place", "questions"}
    assert set(found["place"]) == {"en", "zh"}
    assert all(set(passage) - {"when"} == {"en", "zh"} for passage in found["brief"])
    assert len(found["questions"]) >= 8
    levels = [question["level"] for question in found["questions"]]
    assert levels == sorted(levels)
    assert levels[0] == 1
    assert levels[-1] == 5
    for question in found["questions"]:
        assert set(question) == {"level", "reference", "en", "zh"}
        assert re.match(r"https?://\S+( \(.+\))?$", question["reference"])
        assert "mitpress" not in question["reference"], "a shop's page has no chapter"
        assert "the-book" not in question["reference"] or "section" in question["reference"]
        en, zh = question["en"], question["zh"]
        assert set(en) == set(zh) == {"question", "points", "wrong", "follow_up"}
        assert len(en["points"]) == len(zh["points"]) >= 3
        for mine, theirs in zip(en["points"], zh["points"], strict=True):
            assert sorted(re.findall(NUMBER, mine)) == sorted(re.findall(NUMBER, theirs)), (mine, theirs)
        assert all(re.search(r"[\u4e00-\u9fff]", zh[key]) for key in ("question", "wrong", "follow_up"))


# What nobody says at work, and what is said instead.
FOREIGN = {
    "词元": "token", "评论家": "critic", "演员": "actor", "奈特": "nats", "留出": "验证集", "存储体": "bank",
    "波前": "wavefront", "屋顶线": "roofline", "内核": "kernel", "自举": "bootstrap", "离策略": "off-policy",
    "适配器": "adapter", "张量核心": "tensor core",
}  # fmt: skip
BRITISH = re.compile(r"\b\w*(?:learnt|isation|ised|ising|behaviour|neighbour|colour)\b")


CHINESE = [*FILES, *ROOT.glob("*.zh-CN.md"), *ROOT.glob("learning/*.zh-CN.md"), *ROOT.glob("learning/path.toml"),
           *ROOT.glob("modules/*/*/*/module.toml"), *ROOT.glob("finetune/memory/*.py"),
           *ROOT.glob("finetune/interview/*.py")]  # fmt: skip


@pytest.mark.parametrize("file", CHINESE, ids=lambda path: str(path.relative_to(ROOT)))
def test_chinese_uses_the_words_of_the_trade(file):
    text = file.read_text(encoding="utf-8")
    assert not [f"{word}: {said}" for word, said in FOREIGN.items() if word in text]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.parent.name)
def test_it_is_said_as_at_work(file):
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"(?<=[\u4e00-\u9fff])[A-Za-z]{2,}|[A-Za-z]{2,}(?=[\u4e00-\u9fff])", text), (
        "a blank is missing"
    )
    assert not re.search(r"[\u4e00-\u9fff][.;:?!](?!\w)|[\u4e00-\u9fff], ?[\u4e00-\u9fff]", text), (
        "a Chinese sentence with an English full stop"
    )
    plain = re.sub(r"\{[^}]*\}|when = .*", "", text)
    spelled = [w for w in BRITISH.findall(plain) if not re.search("(?i)supervised|raised|promised|rising", w)]
    assert not spelled


# --- briefs, over a default run (as the module's README shows it) and over a toy run (tests/fixtures/toy_runs.json)

TOYS = json.loads((Path(__file__).parents[1] / "fixtures" / "toy_runs.json").read_text(encoding="utf-8"))
MODULES = [info.name for info in registry.modules()]
TASKS = [name for name in TOYS if " " in name]  # "NAME --task …": another task of a module


def toy_run(name):
    run = TOYS[name]
    return brief.gather(run["summary"], run["config"]) | run["lowest"]


def default_run(name):
    """The facts of the run that the module's README shows."""
    info = registry.find(name)
    page = (info.folder / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- measured -->(.*?)<!-- /measured -->", page, re.DOTALL)
    if not block or "result  " not in block[1]:  # cuda's is a table of its own
        return toy_run(name) | {"toy": False}
    block = block[1]
    summary = {"metrics": {}, "baseline": {}, "target": {}, "standard_error": {}, "toy": False, "seconds": 200.0}
    number = r"(–|[-+.\de]+)"
    row = re.compile(
        rf"\s*(\w+)\s+{number}(?: ± (\S+))?\s+{number}\s+(?:[≤≥] )?{number}(?:\s+(?:reached|missed|equal|–))?\s*$"
    )
    for line in block[block.index("result  ") :].splitlines()[1:]:
        if found := row.match(line):
            metric, *values = found.groups()
            for key, value in zip(("metrics", "standard_error", "baseline", "target"), values, strict=True):
                if value and value != "–":
                    summary[key][metric] = float(value)
    config = dataclasses.asdict(registry.load(info).Config())
    facts = brief.gather(summary | {"steps": config["steps"], "peak_rss_bytes": 10**9}, config)
    checks = {key: row["value"] for key, row in TOYS[name]["summary"].get("checks", {}).items()}
    return checks | facts | {"lowest.fp16.loss": 3.3}  # checks and metrics.csv, which a README does not show


RUNS = {"toy": toy_run, "default": default_run}


def part_holds(part, known):
    """A condition by Python's own rules; a word is itself, what the run does not have makes it false."""
    negated, part = part.startswith("not "), part.removeprefix("not ")
    part = re.sub(r"\b(abs)\.(\w+)", r"\1(\2)", part)
    part = re.sub(r"(?<=[a-z0-9])\.(?=[a-z])", "_", part)
    words = {
        word: word for word in re.findall(r"[a-z_]\w*", part) if (word not in known and " == " in part) or "!=" in part
    }
    try:
        value = eval(part, {}, {"abs": abs} | words | known)
    except NameError:
        value = False
    return (value is False or value is None) == negated


@pytest.mark.parametrize("lang", content.LANGUAGES)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", MODULES)
def test_a_brief_says_what_its_run_did(name, run, lang):
    facts = RUNS[run](name)
    interview = content.read(registry.find(name))
    said = brief.passages(interview, facts, lang)
    text = " ".join(said)
    assert "{" not in text
    known = {key.replace(".", "_"): value for key, value in facts.items()}
    for passage in interview.brief:
        mine = all(part_holds(part, known) for part in filter(None, passage.when.split(" and ")))
        has = all(re.sub(r"^(abs|percent)\.", "", field) in facts for field in fields(passage.text[lang]))
        assert (has and mine) == (has and brief.fill(passage.text[lang], facts, lang) in said), passage.when
    assert sum(any(ch.isdigit() for ch in part) for part in said) >= 2, "a brief without numbers"
    assert ("toy" in text) == (run == "toy")
    if lang == "en":
        assert 110 <= len(text.split()) <= 420, f"{len(text.split())} words are not spoken in 60 to 180 seconds"
    else:
        spoken = len(re.findall(r"[\u4e00-\u9fff]|[A-Za-z]+|\d+", text))
        assert 200 <= spoken <= 850, f"{spoken} syllables and words are not spoken in 60 to 180 seconds"


@pytest.mark.parametrize("lang", content.LANGUAGES)
@pytest.mark.parametrize("task", TASKS)
def test_the_brief_of_another_task_has_its_numbers(task, lang):
    facts = toy_run(task)
    interview = content.read(registry.find(task.split()[0]))
    said = " ".join(brief.passages(interview, facts, lang))
    assert "{" not in said
    for name in TOYS[task]["summary"]["target"]:
        assert brief.fill(f"{{{name}}}", facts, lang) in said


@pytest.mark.parametrize("name", MODULES)
def test_every_number_and_condition_of_a_brief_exists(name):
    others = [toy_run(task) for task in TASKS if task.split()[0] == name]
    known = set().union(*others, *(run(name) for run in RUNS.values())) | {"data"}
    for passage in content.read(registry.find(name)).brief:
        assert fields(passage.text["en"]) == fields(passage.text["zh"])
        names = [re.sub(r"^(abs|percent)\.", "", field) for field in fields(passage.text["en"])]
        for part in filter(None, passage.when.split(" and ")):
            words = [word for word in part.split() if word not in brief.OPERATORS and word != "not"]
            names += [re.sub(r"^(abs|percent)\.", "", words[0])]
            if len(words) == 2 and "_" in words[1]:
                names += [re.sub(r"^(abs|percent)\.", "", words[1])]
        assert not set(names) - known
        for text in passage.text.values():
            rest = re.sub(r"\{[a-z_0-9.]+\}|[A-Za-z]+-?\d+\w*", "", text)  # fields, and names such as bf16
            assert not re.search(NUMBER, rest), "a number in a brief must be one of the run's"


def test_lora_is_claimed_by_lora_runs_only():
    interview = content.read(registry.find("sft"))
    for method, claim in (("lora", "I used LoRA"), ("full", "All weights were trained")):
        text = " ".join(brief.passages(interview, toy_run("sft") | {"method": method}, "en"))
        assert claim in text
        assert ("I used LoRA" in text) == (method == "lora")


def test_lambda_zero_is_spoken_of_if_it_was_trained():
    interview = content.read(registry.find("gae"))
    facts = toy_run("gae")
    assert "lambda zero" not in " ".join(brief.passages(interview, facts, "en"))
    assert "lambda zero it reached 51" in " ".join(brief.passages(interview, facts | {"ppo_return_0": 51}, "en"))
    assert "lambda zero" not in " ".join(brief.passages(interview, facts | {"ppo_return_0": 500.0}, "en"))


@pytest.mark.parametrize(
    ("cql", "naive", "said"),
    [
        (-30.1, 11.9, "underestimates by 30.1"),
        (-5.0, 11.9, "underestimates by 5"),
        (7.0, 11.9, "overestimates as well, by 7"),
    ],
)
def test_the_sign_of_a_critics_error_is_the_runs(cql, naive, said):
    facts = toy_run("cql") | {"overestimate_expert_cql": cql, "overestimate_expert_naive": naive}
    text = " ".join(brief.passages(content.read(registry.find("cql")), facts, "en"))
    assert said in text
    assert ("further from the truth" in text) == (abs(cql) > naive)


def test_unscaled_fp16_is_told_as_it_went():
    interview = content.read(registry.find("mixed_precision"))
    facts = toy_run("mixed_precision")
    text = " ".join(brief.passages(interview, facts, "en"))
    assert "underflow alone does not explain it" in text
    assert brief.spoken(facts["lowest.fp16.loss"], "en") in text
    assert "no worse than with it" in text
    text = " ".join(brief.passages(interview, facts | {"loss_fp16": 4.4, "bf16_no_master_is_worse_by": 0.7}, "en"))
    assert "underflow alone" not in text
    assert "small updates were rounded away" in text


def test_conditions():
    facts = {"a": 1.5, "b": -2, "method": "lora", "toy": True, "off": False, "nothing": 0}
    for condition in ("a", "toy", "not off", "not missing", "method == lora", "a > b", "a == 1.5", "abs.b == 2",
                      "nothing", "toy and a < 2 and method != full", "percent.a >= 150"):  # fmt: skip
        assert brief.holds(condition, facts), condition
    for condition in (
        "missing",
        "off",
        "not toy",
        "method == full",
        "a < b",
        "missing < 1",
        "a == lora",
        "toy and off",
    ):
        assert not brief.holds(condition, facts), condition
    with pytest.raises(brief.UserError, match="condition 'a is b'"):
        brief.holds("a is b", facts)


def test_a_metric_is_said_with_its_standard_error():
    summary = {"metrics": {"gain": 0.98461}, "standard_error": {"gain": 0.0123}, "seconds": 1.0, "peak_rss_bytes": 1}
    facts = brief.gather(summary, {})
    assert brief.fill("it gained {gain}", facts, "en") == "it gained 0.985 ± 0.012"
    assert brief.fill("{percent.gain} of it", facts, "en") == "98.5 ± 1.2% of it"
    assert brief.fill("{gain}", facts | {"error.gain": 1e-6}, "en") == "0.985", "below the digits that are said"
    assert brief.fill("差 {x} 个", facts | {"x": 3e-9}, "zh") == "差不到百万分之一 个"
