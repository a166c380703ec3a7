"""`compare` of runs: the same prompts answered by their models."""

import dataclasses
import json
import shutil

import pytest
from small_served import adapter, llama
from small_server import trained_tokenizer

from finetune import chat
from finetune.cli import main
from finetune.interview import answers
from finetune.lm.io import load, save
from finetune.runs import registry
from finetune.runs.run import execute

NEW = ["--max-new-tokens", "6"]


def run(name, folder, **changes):
    info = registry.find(name)
    toy = registry.load(info).Config.toy()
    execute(info, dataclasses.replace(toy, threads=1, steps=1, **changes), folder, toy=True)
    return folder


def keep(folder, model, rows):
    """The folder of a run becomes one of this model that kept these answers."""
    shutil.rmtree(folder / "model")
    if model is not None:
        shutil.copytree(model, folder / "model")
    (folder / "answers.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with adapters of one base (a question, a text), one with a model for itself, one that kept none."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = trained_tokenizer()
    save.model(llama(vocab_size=tokenizer.vocab_size), root / "base", tokenizer)
    save.model(llama(vocab_size=tokenizer.vocab_size, layers=1), root / "whole", tokenizer)
    small = {"samples": 4, "sft_steps": 1}
    made = [run("dpo", root / "a", prompts=40, eval_prompts=40, eval_pairs=4, sample_every=0, gap=0.0, **small)]
    for name in "bcd":
        shutil.copytree(made[0], root / name)
        made.append(root / name)
    for seed in range(2):
        base = load.llama(root / "base")
        config = adapter(root / f"adapter{seed}", seed, base) / load.ADAPTER_CONFIG
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(root / "base")}))
    text = {"prompt": "the lazy", "before": "x", "after": "kept text"}
    keep(made[0], root / "adapter0", [{"prompt": "only a", "before": "", "after": ""}, text])
    keep(made[1], root / "adapter1", [{"prompt": "only b", "before": "", "after": ""}, text])
    keep(made[2], root / "whole", [text, {"prompt": "line one\nline", "before": "", "after": ""}])
    keep(made[3], None, [text])
    return made


def test_the_prompts_that_most_runs_kept_come_first_and_then_those_of_each(runs):
    found = answers.chosen([answers.read(folder.name, folder) for folder in runs], 10)
    assert found == [("the lazy", False), ("only a", False), ("only b", False), ("line one\nline", False)]


def test_models_answer_and_what_has_none_shows_what_it_kept(runs):
    read = [answers.read(folder.name, folder) for folder in runs]
    assert [one.model is not None for one in read] == [True, True, True, False]
    found = answers.answered(read, [("the lazy", False), ("line one\nline", False)], 6)
    first, second = found.rows
    assert list(first) == ["base", "a", "b", "c", "d (kept)"]
    for name, folder in zip("abc", runs, strict=False):
        assert first[name] == chat.answer(str(folder), ["the lazy"], False, max_new_tokens=6)[0]
    assert len({first[name] for name in ("base", "a", "b", "c")}) == 4
    assert first["base"] == chat.answer(str(runs[0].parent / "base"), ["the lazy"], False, max_new_tokens=6)[0]
    assert first["d (kept)"] == "kept text"
    assert list(second) == ["base", "a", "b", "c"]
    assert not any("\n" in text for text in second.values())
    assert found.notes == [f"d: {runs[3]} has no model"]


def test_a_model_that_cannot_read_a_prompt_says_why(runs):
    read = [answers.read(folder.name, folder) for folder in runs[:3]]
    found = answers.answered(read, [("the " * 200, False), ("the lazy", False)], 6)
    assert found.rows[0] == {}
    assert set(found.rows[1]) == {"base", "a", "b", "c"}
    assert [note.split(":")[0] for note in found.notes] == ["a, b", "c"]


def test_the_command(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = [str(folder) for folder in runs]
    assert main(["compare", *names, *NEW, "--out", str(tmp_path / "page.md")]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for text in ("dpo a", "dpo d (kept)", "the lazy", "line one", "kept text", "has no model"):
        assert text in " ".join(shown.split()), text
    page = (tmp_path / "page.md").read_text()
    assert page.count("## Prompt") == 4
    assert "**dpo d (kept)**\n\n    kept text" in page
    assert main(["compare", *names[:2], "--prompt", "the fox", *NEW, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    wanted = chat.answer(names[1], ["the fox"], max_new_tokens=6)[0]  # by the chat template
    assert [row["answers"][0]["prompt"] for row in rows] == ["the fox", "the fox"]
    assert rows[1]["answers"][0]["text"] == wanted
    assert wanted != chat.answer(names[1], ["the fox"], False, max_new_tokens=6)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mdp", "--prompt", "x"], "there is nothing to ask"),
        (["./none"], "nor the folder of a run"),
    ],
)
def test_what_cannot_be_compared(words, message, capsys):
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_runs_of_the_modules_themselves(tmp_path, capsys):
    """A toy of grpo keeps texts, one of sft questions, which are too long for the other's model."""
    made = [
        run("grpo", tmp_path / "grpo", prompts=2, samples=2, sft_steps=1, eval_every=0),
        run("sft", tmp_path / "sft", batch=2, eval_rows=2, eval_every=0, samples=2),
    ]
    read = [answers.read(folder.name, folder) for folder in made]
    assert [one.chat for one in read] == [False, True]
    found = answers.answered(read, answers.chosen(read, 2), 4)
    assert [set(row) for row in found.rows] == [{"grpo", "sft"}, {"sft"}]
    assert [note.split(":")[0] for note in found.notes] == ["grpo"]
