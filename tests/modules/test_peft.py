"""The module peft: what its methods reach, that they leave the base alone, what they leave behind, bad input."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from seeds import OTHERS
from summaries import numbers

from finetune.errors import UserError
from finetune.interview import brief as briefs
from finetune.lm.io import load
from finetune.peft.adapters import load_adapter, load_prompt
from finetune.runs import registry
from finetune.runs.run import execute

ROOT = Path(__file__).parents[2]
INFO = registry.find("peft")
main = registry.load(INFO)
methods, data, training = (registry.part("peft", name) for name in ("methods", "data", "training"))
FEW = {"methods": "full,lora_8,nf4_4,prefix_4", "base_steps": 4, "eval_rows": 8}


METHODS = "full,lora_8,dora_8,pissa_8,prompt_16,prefix_16,nf4_8"


def toy(**changes):
    return dataclasses.replace(main.Config.toy(), **{"threads": 1, "methods": METHODS} | changes)


def run(folder, **changes):
    return execute(INFO, toy(**changes), folder, toy=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "run"
    return folder, run(folder)


# --- it learns


@pytest.mark.parametrize("seed", OTHERS)
def test_toy_reaches_its_targets(no_pictures, tmp_path, seed):
    """All methods; seed 0 is `finished`."""
    assert run(tmp_path / "run", seed=seed, methods=main.METHODS)["passed"]


@pytest.mark.slow
def test_rank_8_reaches_nine_tenths_of_full_fine_tuning(finished):
    metrics = numbers(finished[1])
    assert finished[1]["passed"]
    guessing = metrics["loss_of_guessing"]
    assert metrics["loss_before"] > 2 * guessing  # the base is sure of the old directory
    for name in ("full", "lora_8", "dora_8", "pissa_8", "nf4_8"):
        assert metrics[f"{name}_loss"] < guessing / 2, name
    assert metrics["lora_8_of_full_gain"] >= 0.9
    assert metrics["nf4_8_loss"] <= metrics["lora_8_loss"] + 0.1
    for name in (
        "prompt_16",
        "prefix_16",
    ):  # so much context does not hold a directory: they learn to doubt the old one
        assert metrics["lora_8_loss"] < metrics[f"{name}_loss"] < metrics["loss_before"]


def test_bytes_are_predicted(finished):
    rows = {row["name"]: row for row in finished[1]["memory"]}
    for method in ("full", "lora_8", "nf4_8"):
        for term in ("weights", "gradients", "optimizer states"):
            row = rows[f"{method}: {term}"]
            assert row["predicted"] == row["measured"] > 0, row
        row = rows[f"{method}: activations"]
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.05)
    metrics = numbers(finished[1])
    for method in toy().chosen:
        assert metrics[f"{method.name}_bytes_predicted"] == pytest.approx(metrics[f"{method.name}_bytes"], rel=0.03)
    assert metrics["nf4_8_bytes"] < metrics["lora_8_bytes"] < metrics["full_bytes"]


def test_bytes_of_patterns_and_of_the_head(no_pictures, tmp_path):
    """Also where head and embedding are tied."""
    few = FEW | {"methods": "lora_2,dora_2,nf4_2", "base_steps": 1, "steps": 1, "mix": False}
    metrics = numbers(run(tmp_path / "run", **few, targets="attn.[qv],head"))
    for name in ("lora_2", "dora_2", "nf4_2"):
        assert metrics[f"{name}_bytes_predicted"] == pytest.approx(metrics[f"{name}_bytes"], rel=0.02), name


def test_two_adapters_on_one_base(finished):
    """Switched, each does its own task and leaves the other as it was; half of both does a good part of both."""
    rows = next(
        t["rows"] for t in json.loads((finished[0] / "samples.json").read_text()) if "two adapters" in t["title"]
    )
    losses = {row["active"]: [float(row[f"{task} task"]) for task in ("first", "second")] for row in rows}
    base = losses["none"]
    assert losses["1 · first"][0] < 0.3 * base[0]
    assert losses["1 · second"][1] < 0.3 * base[1]
    half = losses["0.5 · first + 0.5 · second"]
    assert half[0] < base[0]
    assert half[1] < base[1]
    assert losses["1 · first"][0] == pytest.approx(finished[1]["metrics"]["lora_8_loss"], abs=1e-3)


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 3, "lr": 0.0, "lr_full": 0.0, "lr_virtual": 0.0}])
def test_without_training_there_is_no_gain(no_pictures, tmp_path, change):
    summary = run(tmp_path / "run", **FEW, **change)
    assert summary["passed"] is False
    passed = [summary["reached"][f"{name}_loss"] for name in ("full", "lora_8")]
    passed += [summary["checks"][f"{name}_loss"]["passed"] for name in ("nf4_4", "prefix_4")]
    assert passed == [False] * 4
    assert summary["metrics"]["lora_8_loss"] == summary["metrics"]["loss_before"]


@pytest.mark.long
def test_destroyed_data_falls_to_chance(no_pictures, tmp_path):
    changes = FEW | {"base_steps": 450, "eval_rows": 80, "methods": "full,lora_8", "mix": False}
    summary = run(tmp_path / "run", **changes, shuffle_answers=True)
    assert not summary["passed"]
    for name in ("full_loss", "lora_8_loss"):
        assert summary["metrics"][name] > 0.95 * summary["checks"]["loss_of_guessing"]["value"]


# --- what it leaves behind


def test_run_folder(finished):
    folder = finished[0]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    for method in (*toy().chosen, methods.Method("base"), methods.Method("second")):
        steps = [int(r["step"]) for r in rows if r["phase"] == method.name]
        assert steps == list(range(toy().base_steps if method.kind == "base" else toy().steps))
    for name in ("comparison", "training_curves", "memory"):
        assert (folder / f"{name}.png").stat().st_size > 20_000
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pkl", ".bin")]


def test_the_brief_speaks_this_run(finished):
    for lang in ("en", "zh"):
        said = briefs.brief(registry.find("peft"), lang, finished[0])
        assert len(said) > 300
        assert "{" not in said


def test_saved_adapters_give_the_losses_back(finished, tmp_path):
    """On the base that was saved; those over quantized weights are omitted, since their base is another."""
    folder, summary = finished
    sets = data.task_conversations(toy())
    documents = data.tokenize(toy(), sets, data.small_tokenizer(sets), print)["first_held_out"]
    for method in toy().chosen:
        model, part = load.llama(folder / "base"), None
        if method.kind in methods.VIRTUAL:
            part = load_prompt(model, folder / "adapters" / method.name)
            run_ = methods.prefixed if method.kind == "prefix" else methods.prompted
            forward = lambda batch, m=model, p=part, r=run_: r(p, m, batch)  # noqa: E731
        elif method.kind in methods.ADAPTERS:
            load_adapter(model, folder / "adapters" / method.name)
            forward = lambda batch, m=model: methods.plain(m, batch)  # noqa: E731
        else:
            continue
        loss = training.evaluate(toy(), methods.Adapted(model, {}, forward), documents)
        assert loss == pytest.approx(numbers(summary)[f"{method.name}_loss"], rel=1e-4), method.name


@pytest.mark.peer
def test_saved_adapters_open_in_peft_and_the_merged_model_in_transformers(finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = finished[0]
    tokens = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    merged = load.llama(folder / "model")(tokens)
    for method in toy().chosen:
        if method.kind == "full":
            continue
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        theirs = PeftModel.from_pretrained(base, folder / "adapters" / method.name).eval()(tokens).logits
        model = load.llama(folder / "base")
        if method.kind in methods.VIRTUAL:
            mine = load_prompt(model, folder / "adapters" / method.name)(model, tokens)
        else:
            load_adapter(model, folder / "adapters" / method.name)
            mine = model(tokens)
        assert (mine - theirs[:, -20:]).abs().max() <= 5e-6 * theirs.abs().max(), method.name
        if method.name == "lora_8":
            assert (merged - theirs).abs().max() <= 5e-6 * theirs.abs().max()
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model")(tokens).logits
    assert (merged - theirs).abs().max() <= 2e-6 * theirs.abs().max()


def test_the_base_stays_what_it_was_and_a_change_would_be_seen(no_pictures, monkeypatch, tmp_path):
    few = FEW | {"methods": "lora_2,dora_2,pissa_2,nf4_2,prompt_2", "steps": 2}
    run(tmp_path / "run", **few)
    train = training.train

    def changing(cfg, run, adapted, *rest):
        adapted.model.norm.weight.data[0] += 1e-7
        return train(cfg, run, adapted, *rest)

    monkeypatch.setattr(main, "train", changing)
    with pytest.raises(AssertionError, match="lora_2 changed the frozen weights"):
        run(tmp_path / "other", **few)


def test_an_interrupted_run_goes_on_to_the_same_bits(no_pictures, monkeypatch, tmp_path):
    """Stopped after the first method of three: what is finished is not done again, and the rest is the same."""
    few = FEW | {"methods": "lora_2,prefix_2,nf4_2", "steps": 4}
    run(tmp_path / "whole", **few)
    evaluate, calls = training.evaluate, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(main, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", **few)
    monkeypatch.setattr(main, "evaluate", evaluate)
    execute(INFO, toy(**few), tmp_path / "stopped", toy=True, resume=True)
    for name in ("metrics.csv", "adapters/nf4_2/adapter_model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": "lora"}, "lora needs its rank, 1 to 65536, such as lora_8"),
        ({"methods": "lorra_8"}, "'lorra_8' is not a method.*did you mean 'lora'"),
        ({"methods": "lora_8,lora_8"}, "--methods names lora_8 twice"),
        ({"methods": "prompt_0"}, "virtual tokens"),
        ({"methods": "lora_99999999999"}, "lora needs its rank, 1 to 65536"),
        ({"methods": "full,pissa_999"}, "pissa_999: a layer of the model has 32 singular values only"),
        ({"methods": "full,prompt_60000"}, "60000 virtual tokens begin as tokens of the rows"),
        ({"methods": "full,lora_2", "max_length": 1 << 26, "batch": 1 << 20}, "of memory by the formulas"),
        ({"alpha": math.inf}, "--alpha inf is not a finite number"),
        ({"alpha": 0.0}, "--alpha 0 is too small"),
        ({"dropout": 1.0}, "--dropout 1 is too large"),
        ({"lr_virtual": -1.0}, "--lr-virtual -1 is too small"),
        ({"clip": 0.0}, "--clip 0 is too small"),
        ({"targets": "x", "base_steps": 0, "methods": "lora_2"}, "'x' names no linear layer"),
        ({"batch": 0}, "--batch 0 is too small"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()  # refused before the first step


def test_an_adapter_is_saved_before_what_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "measured", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", **FEW | {"methods": "lora_8", "steps": 1, "base_steps": 1})
    assert (tmp_path / "run/adapters/lora_8/adapter_model.safetensors").exists()
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_own_data(no_pictures, tmp_path):
    rows = [{"prompt": f"What comes after {i}?", "completion": str(i + 1)} for i in range(40)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = run(tmp_path / "run", **FEW | {"methods": "full,lora_2", "steps": 20}, data=tmp_path / "own.jsonl")
    assert summary["metrics"]["full_loss"] < summary["metrics"]["loss_before"]
    assert "half_keeps_first" not in summary["checks"]  # there is no second task
    (tmp_path / "own.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="one row only"):
        run(tmp_path / "other", data=tmp_path / "own.jsonl")
