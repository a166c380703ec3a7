"""`python -m finetune memory MODULE` of modules whose network is not a language model."""

import json

import pytest

from finetune.cli import main
from finetune.memory import cards


@pytest.mark.parametrize("name", ["dit", "diffusion"])
def test_a_modules_own_terms_are_what_is_measured(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["memory", name, "--toy", "--measure", "--batch", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["weights", "gradients", "optimizer states", "EMA", "activations"]
    assert [row["name"] for row in found["rows"]] == [f"training: {name}" for name in names]
    assert all(row["predicted"] == row["measured"] > 0 for row in found["rows"])
    terms = {term["name"]: term["bytes"] for term in found["terms"]}
    assert [*terms] == [*names, "peak"]
    assert terms["peak"] == sum(terms[name] for name in names)
    assert terms["EMA"] == 4 * found["parameters"]
    assert found["cards"] == cards.verdicts(terms["peak"])


def test_settings_change_the_plan(capsys):
    def activations(*words):
        assert main(["memory", "dit", *words, "--json"]) == 0
        return {term["name"]: term["bytes"] for term in json.loads(capsys.readouterr().out)["terms"]}["activations"]

    assert activations("--batch", "16") * 2 == activations("--batch", "32")
    assert activations("--gradient-checkpointing", "true") < activations() / 4


def test_the_table_and_the_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["memory", "diffusion", "--toy", "--measure", "--batch", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("exact") == 5
    assert "One image keeps" in shown
    assert (tmp_path / "output/memory/diffusion.png").stat().st_size > 1000


@pytest.mark.parametrize("words", [["--for", "8 GiB"], ["--simulate"]])
def test_what_only_language_models_have_is_refused(words, capsys):
    assert main(["memory", "dit", "--toy", *words]) == 2
    assert "--for and --simulate are for language models; --measure is for" in capsys.readouterr().err
