"""The cheat sheet: each of its formulas measured, its pages, and the command that does so."""

import json
import re

import pytest

from finetune.cli import main
from finetune.interview import cheat_sheet
from finetune.lm.gpt import GPTConfig
from finetune.lm.llama import LlamaConfig
from finetune.memory import Setup, activations, formulas, lab, predict, shape_of
from finetune.memory.sheet import ENTRIES, entries_for
from finetune.runs import machine

LLAMA = LlamaConfig(vocab_size=700, dim=64, layers=3, heads=4, kv_heads=2, hidden=96, max_length=64, tied=False)
GPT2 = GPTConfig(vocab_size=700, dim=64, layers=3, heads=4, max_length=128)


@pytest.fixture(scope="module")
def rows():
    """Of a Llama whose run has LoRA."""
    told = []
    found = lab.measure(LLAMA, Setup(batch=2, seq=80, lora_rank=3), lambda *at: told.append(at))
    assert told == [(done, told[-1][1]) for done in range(told[-1][1] + 1)]
    return found


def compare(rows):
    """What counts tensors to the byte, the rest within 5 %; that one thing alone has no meter is known."""
    for row in rows:
        term, found = row["name"].rpartition(": ")[2], row["measured"]
        if term == "gathered parameters":
            assert found is None
        elif term in ("activations", "logits") or row["simulated"]:
            assert row["predicted"] == pytest.approx(found, rel=0.05), row
        elif term != "step growth":  # so small a step's is the process's own
            assert row["predicted"] == found > 0, row


def test_every_formula_is_measured(rows):
    compare(rows)
    names = [f"{e.name[0]}: {term}" for e in entries_for(shape_of(LLAMA)) for term in e.terms]
    assert [row["name"] for row in rows if not row["name"].startswith("as it is")] == names
    assert len(names) > 30
    assert {row["simulated"] for row in rows if "ZeRO" in row["name"]} == {True}


def test_of_a_gpt_too(monkeypatch):
    """Without ZeRO, whose simulation is tested on GPT-2's own shape."""
    monkeypatch.setattr(lab, "entries_for", lambda shape: [e for e in entries_for(shape) if "zero" not in e.changes])
    compare(lab.measure(GPT2, Setup(batch=2, seq=96, checkpointing="block"), lambda done, of: None))
    shape, alone = shape_of(GPT2), Setup(batch=1, seq=96, attention="naive")
    found = lab.measured(GPT2, alone, {"activations of a block": activations.block(shape, alone)})
    assert found == {"activations of a block": activations.block(shape, alone).bytes}


def test_a_measurement_is_of_the_setting_it_names(rows):
    """Each differs from the plain one as it should: a meter that ignored its setting would be seen."""
    found = {row["name"]: row["measured"] for row in rows}
    flash, naive, again = (
        found[f"activations, {how}: activations"] for how in ("flash attention", "T×T attention", "checkpointing")
    )
    assert naive > flash + 8 * 2 * 80 * 80 * LLAMA.heads * LLAMA.layers > again
    assert found["16 bits, 8-bit AdamW: optimizer states"] < found["fp32, AdamW: optimizer states"]
    assert found["inference, 8-bit paged cache: KV cache"] < found["inference: KV cache"]
    assert found["ZeRO-1, 8 ranks: gradients"] > 7 * found["ZeRO-2, 8 ranks: gradients"]
    assert found["ZeRO-2, 8 ranks: weights"] > 7 * found["ZeRO-3, 8 ranks: weights"]


def test_what_does_not_fit_is_not_tried(monkeypatch):
    shape, setup = shape_of(LLAMA), Setup(batch=1, seq=64)
    terms = {term.name: term for term in predict(shape, setup)[:-1]}
    needed = sum(terms[name].bytes for name in ("weights", "gradients", "optimizer states"))
    room = (needed + terms["activations"].bytes + 1) / lab.ROOM
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: room)
    found = lab.measured(LLAMA, setup, terms)
    assert found["activations"] is not None
    assert found["step growth"] is None


def test_the_command_shows_and_draws(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setattr(lab, "measure", lambda *args: rows)
    assert main(["memory", "gpt2", "--measure"]) == 0
    out = capsys.readouterr().out
    for word in ("16 bits with an fp32 master", "exact", "simulated", "output/memory/gpt2.png"):
        assert word in out
    assert (tmp_path / "output/memory/gpt2.png").read_bytes().startswith(b"\x89PNG")
    assert main(["memory", "llama-7b", "--dtype", "bf16", "--seq", "64", "--simulate", "--json"]) == 0
    simulated = json.loads(capsys.readouterr().out)["rows"]
    assert {row["name"] for row in simulated} == {"weights", "gradients", "optimizer states", "activations"}
    assert all(row["simulated"] for row in simulated)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "none"])
def test_every_setting_of_a_model_is_shown(dtype, optimizer, capsys):
    words = ["--dtype", dtype, "--optimizer", optimizer, "--ranks", "4", "--zero", "2", "--algorithm", "ppo"]
    assert main(["memory", "llama-2-70b", *words]) == 0
    assert "does not fit here" in capsys.readouterr().out


def test_mistakes(monkeypatch, capsys):
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1 << 30)
    for words, message in (
        (["llama-7b", "--measure", "--simulate"], "one of them"),
        (["llama-7b", "--measure"], "are free here: --simulate needs none"),
        (["gpt2", "--measure", "--ranks", "4"], "--measure is for one rank"),
        (["sft", "--simulate"], "--measure is for a module such as 'sft'"),
    ):
        assert main(["memory", *words]) == 2
        assert message in capsys.readouterr().err


# --- the pages


def test_the_sheet_has_every_formula_of_the_lab():
    shown = {(e.name[0], term) for e in ENTRIES for term in e.terms}
    terms = {term for _, term in shown}
    assert {t.name for t in predict(cheat_sheet.SHAPE, Setup(algorithm="ppo", zero=3, ranks=2))} - terms == {
        "step growth", "peak",
    }  # fmt: skip
    assert "KV cache" in terms
    changed = [key for entry in ENTRIES for key in entry.changes]
    assert {"dtype", "optimizer", "lora_rank", "attention", "checkpointing", "loss", "kv_dtype", "zero"} <= {*changed}
    assert {e.changes.get("zero") for e in ENTRIES} >= {1, 2, 3}
    assert {e.changes.get("algorithm") for e in ENTRIES} >= {"dpo", "grpo", "ppo"}


def test_the_pages():
    """Both languages show the same formulas and bytes; every letter is explained; every module has its row."""
    english, chinese = (cheat_sheet.page(lang) for lang in ("en", "zh"))

    def numbers(page):
        return re.findall(r"(`.+`) \| ([\d.,]+ [KMG]iB) \|$", page, re.MULTILINE)

    assert numbers(english) == numbers(chinese)
    assert [line[:3] for line in english.splitlines() if line[:2] == "##"] == [
        line[:3] for line in chinese.splitlines() if line[:2] == "##"
    ]
    for page in (english, chinese):
        explained = set(re.findall(r"^- `(\w)` ", page, re.MULTILINE))
        table = "".join(re.findall(r"^\|.*`(.+?)`.*\|$", page, re.MULTILINE))
        assert set(re.findall(r"[A-Za-z]", table)) == explained <= set(formulas.MEANING)
    for info in cheat_sheet.registry.modules():
        assert f"[{info.name}](" in english
        assert info.compare["used"]["zh"] in chinese
