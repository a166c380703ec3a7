"""Every drill: right answers pass, the usual mistakes do not, and what is printed is true."""

import ast
import doctest
import re

import pytest
import torch

from finetune import cli
from finetune.drills import catalog, judge, run
from finetune.drills.cases import Draw
from finetune.drills.journal import Journal

DRILLS = {drill.name: drill for drill in catalog.drills()}
PYTHON = [name for name, drill in DRILLS.items() if drill.solution.suffix == ".py"]
# Each mistake in CUDA is compiled, which takes seconds: by default the first of each drill.
MISTAKES = [
    pytest.param(name, mistake, marks=[pytest.mark.long] if number and drill.subject == "cuda" else [])
    for name, drill in DRILLS.items()
    for number, mistake in enumerate(drill.text.mistakes)
]


@pytest.fixture(scope="module")
def judges():
    return {}


@pytest.fixture
def judged(judges):
    def of(name):
        if name not in judges:
            judges[name] = judge.Judge(DRILLS[name])
        return judges[name]

    return of


def test_names_are_unique_and_subjects_known():
    folders = [path.parent for path in catalog.ROOT.glob("*/*/drill.toml")]
    assert len({path.name for path in folders}) == len(folders)
    assert {path.parent.name for path in folders} <= set(catalog.SUBJECTS)


@pytest.mark.parametrize("name", DRILLS)
@pytest.mark.parametrize("answer", ["solution", "also"])
def test_right_answers_pass(name, answer, judged):
    (path,) = DRILLS[name].folder.glob(f"{answer}.*")
    verdict = judged(name).verdict(path)
    assert verdict["ok"], verdict
    assert verdict["passed"] >= 5


@pytest.mark.parametrize("name", DRILLS)
def test_at_least_five_mistakes(name):
    assert len(DRILLS[name].text.mistakes) >= 5


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_a_mistake_fails_and_is_named(name, mistake, judged):
    drill = DRILLS[name]
    verdict = judged(name).verdict(drill.solution, drill.mistaken(mistake))
    assert not verdict["ok"]
    if drill.solution.suffix != ".py":
        assert verdict["what"] in ("nan", "element", "slow") or verdict["details"]["error"].startswith("solution."), (
            verdict
        )
        return
    assert verdict["what"] != "raised" or "raises" in drill.text.mistakes[mistake].en, verdict
    assert verdict["mistake"] == mistake, verdict


@pytest.mark.parametrize("name", DRILLS)
def test_the_stub_is_unwritten_or_has_the_planted_bug(name, judged):
    planted = DRILLS[name].text.planted
    assert bool(planted) == (DRILLS[name].subject == "debug")
    for lang in ("en", "zh"):
        source = DRILLS[name].stub(lang)
        verdict = judged(name).verdict(DRILLS[name].solution, source)
        if name not in PYTHON:
            assert not verdict["ok"]
            continue
        assert planted or verdict["what"] == "unwritten", verdict
        assert verdict.get("mistake", "") == planted
        told = "\n".join(text for text, _ in run.told(DRILLS[name], verdict, lang))
        assert not planted or getattr(DRILLS[name].text.mistakes[planted], lang) not in told


@pytest.mark.parametrize("name", PYTHON)
def test_the_example_is_true_in_both_languages(name):
    drill = DRILLS[name]
    code = judge.load("drill_example", drill.solution)
    examples = doctest.DocTestParser().get_examples(ast.get_docstring(ast.parse(drill.solution.read_text())))
    assert examples
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    found = doctest.DocTest(examples, dict(vars(code), torch=torch), name, None, None, None)
    said = []
    assert runner.run(found, out=said.append).failed == 0, "".join(said)
    chinese = doctest.DocTestParser().get_examples(drill.text.task_zh)
    assert [(e.source, e.want) for e in chinese] == [(e.source, e.want) for e in examples]


@pytest.mark.parametrize("name", DRILLS)
def test_chinese_is_chinese(name):
    text = DRILLS[name].text
    every = [text.title, text.asked, *text.hints, *text.mistakes.values()]
    for each in every:
        assert each.en
        assert re.search(r"[\u4e00-\u9fff]", each.zh), each.zh
        assert not re.search(r"[\u4e00-\u9fff]", each.en), each.en


def test_case_names_in_chinese():
    names = {
        case.name for d in DRILLS.values() for case in judge.python("check", d.folder / "check.py").cases(Draw(d.name))
    }
    book = catalog.case_names()
    keys = {name: catalog.case_key(name, book) for name in names}
    assert set(book) - set(keys.values()) == set()
    assert sum(key not in book for key in keys.values()) <= len(names) // 20  # a new drill's may follow later
    for name in names:
        assert not re.search("[#{}]", catalog.case_name(name, "zh"))
    assert (
        catalog.case_name("stage 0 of 2, 3 micro-batches", "zh") == "2 个阶段中的第 0 个（从 0 数），3 个 micro-batch"
    )
    assert catalog.case_name("bfloat16", "zh") == "bfloat16"


# --- Checking a draft, as a learner does


@pytest.fixture
def learner(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    return tmp_path / "drills"


def drill(capsys, *words):
    code = cli.main(["drill", *words])
    return code, capsys.readouterr().out


def test_from_the_stub_to_a_star(learner, capsys):
    assert "0 of" in drill(capsys)[1]
    assert drill(capsys, "start", "softmax")[0] == 0
    code, out = drill(capsys, "check", "softmax")
    assert code == 1
    assert "write the body first" in out
    source = DRILLS["softmax"].solution.read_text()
    (learner / "softmax.py").write_text(source.replace("x - largest", "x"))
    code, out = drill(capsys, "check", "softmax")
    assert code == 1
    assert "numbers near 1e4" in out
    assert "the maximum is not subtracted" in out
    assert "x = tensor([" in out
    (learner / "softmax.py").write_text(source)
    code, out = drill(capsys, "check", "softmax")
    assert code == 0
    assert "green" in out
    assert "again" in out
    assert "1 of" in drill(capsys)[1]


def test_a_look_at_the_solution_costs_the_star_until_a_new_start(learner, capsys):
    drill(capsys, "start", "softmax")
    assert "largest" in drill(capsys, "solution", "softmax")[1]
    (learner / "softmax.py").write_text(DRILLS["softmax"].solution.read_text())
    found = Journal()
    found.record(DRILLS["softmax"], True)
    assert not found.entry(DRILLS["softmax"]).star
    drill(capsys, "start", "softmax")
    assert (learner / "softmax.1.py").read_text() == DRILLS["softmax"].solution.read_text()
    found = Journal()
    found.record(DRILLS["softmax"], True)
    assert Journal().entry(DRILLS["softmax"]).star


def test_hints_come_one_after_another(learner, capsys):
    hints = [drill(capsys, "hint", "softmax")[1] for _ in range(4)]
    assert len(set(hints)) == 3
    assert "提示 3/3" in drill(capsys, "hint", "softmax", "--lang", "zh")[1]


ANSWERS = {
    "loop": ("def softmax(x):\n    while True: pass\n", "time", 2),
    "crash": ("import ctypes\n\ndef softmax(x):\n    return ctypes.string_at(0)\n", "crash", 4),
    "memory": ("import torch\n\ndef softmax(x):\n    return torch.zeros(1 << 34)\n", "raised", 4),
    "syntax": ("def softmax(x)\n    return x\n", "raised", 1),
    "exits": ("import os\n\ndef softmax(x):\n    os._exit(3)\n", "ended", None),
    "missing": ("def sofmax(x):\n    return x\n", "missing", None),
    "in place": ("def softmax(x):\n    return x.sub_(x.amax(-1, keepdim=True)).softmax(-1)\n", "raised", 2),
    "detached": ("def softmax(x):\n    return x.detach().softmax(-1)\n", "no_gradient", None),
    "wider": ("def softmax(x):\n    return x.double().softmax(-1)\n", "dtype", None),
    "list": ("def softmax(x):\n    return x.softmax(-1).tolist()\n", "kind", None),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_wrong_is_named_by_line(name, tmp_path):
    source, what, line = ANSWERS[name]
    path = tmp_path / "softmax.py"
    path.write_text(source)
    verdict = run.check(DRILLS["softmax"], path, seconds=6 if what == "time" else 60)
    assert not verdict["ok"]
    assert verdict["what"] == what, verdict
    assert verdict.get("line") == line
    for lang in ("en", "zh"):
        text = "\n".join(each for each, _ in run.told(DRILLS["softmax"], verdict, lang))
        assert "{" not in text
        assert line is None or str(line) in text


def test_only_the_failing_case_is_printed(tmp_path):
    path = tmp_path / "softmax.py"
    path.write_text("def softmax(x):\n    print('saw', len(x))\n    return x.exp() / x.exp().sum(-1, keepdim=True)\n")
    verdict = run.check(DRILLS["softmax"], path)
    assert verdict["case"] == "numbers near 1e4"
    assert verdict["printed"] == "saw 2\n"


KERNELS = {
    "does not compile": ("block_sum", "float own = 0.0f;", "float own = 0.0f", "expected"),
    "race": ("block_sum", "part[t] = own;\n  __syncthreads();", "part[t] = own;", "a barrier is missing"),
    "out of bounds": ("vector_add", "if (i < n) y[i]", "y[i]", "past the end"),
    "not C++": ("dot", "float total = 0.0f;", "float total = zero;", "not declared"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_wrong_with_a_kernel_is_named_by_line(name, tmp_path):
    drill, old, new, word = KERNELS[name]
    source = DRILLS[drill].solution.read_text()
    path = tmp_path / DRILLS[drill].solution.name
    path.write_text(source.replace(old, new))
    verdict = run.check(DRILLS[drill], path)
    assert not verdict["ok"]
    assert word in verdict["details"]["error"], verdict
    first = source[: source.index(old)].count("\n") + 1
    assert first <= verdict["line"] <= first + 8, verdict


SCATTERED = """{
    const int64_t j = i / 128 * 128 + (i % 128) * 33 % 128;  // neighbors are 33 numbers apart
    if (j < n) y[j] = a[j] + b[j];
  }"""


def test_a_kernel_has_a_score(tmp_path):
    path = tmp_path / "answer.cu"
    source = DRILLS["vector_add"].solution.read_text()
    path.write_text(source)
    score = run.check(DRILLS["vector_add"], path)["score"]
    assert score["yours"] == score["solution"]
    assert score["yours"]["sectors"] == score["least"]["sectors"]
    path.write_text(source.replace("if (i < n) y[i] = a[i] + b[i];", SCATTERED))
    verdict = run.check(DRILLS["vector_add"], path)
    assert verdict["ok"], verdict
    assert verdict["score"]["yours"]["sectors"] > 2 * verdict["score"]["least"]["sectors"]
    for lang in ("en", "zh"):
        _, (text, _) = run.told(DRILLS["vector_add"], verdict, lang)
        assert str(verdict["score"]["yours"]["sectors"]) in text


def test_a_strange_name_is_refused(learner, capsys):
    assert cli.main(["drill", "check", "sofmax"]) == 2
    assert "did you mean 'softmax'" in capsys.readouterr().err
    assert cli.main(["drill", "check", "softmax"]) == 2
    assert "drill start softmax" in capsys.readouterr().err
