"""An adapter after its training, by the command line: answers next to the base's, several, merged, moved bases."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from small_adapters import shake
from small_gguf import TEXT, tiny, write

from finetune.cli import FORMS
from finetune.cli import main as command
from finetune.lm.io import gguf_write, load, save
from finetune.lm.io.weights import read_safetensors as weights_of
from finetune.lm.tokenizer import Tokenizer, answer_text, stop_ids
from finetune.peft import adapters, lora, whole
from finetune.peft.virtual_tokens import Prompt
from finetune.runs import registry, run_folder

TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture
def home(tmp_path):
    """A base model and adapters of it: LoRA, DoRA, one with more tokens, a prompt."""
    tokenizer = Tokenizer.train([TEXT], 300)
    save.model(tiny(), tmp_path / "base", tokenizer)
    for name in ("lora", "dora", "tokens"):
        model = load.llama(tmp_path / "base")
        if name == "tokens":
            whole.set_weight(model.embed, torch.cat([model.embed.weight, model.embed.weight[:6]]).detach())
            whole.fit_vocabulary(model)
        lora.apply_lora(model, 2, 64, generator=torch.Generator().manual_seed(len(name)), dora=name == "dora")
        if name == "tokens":
            lora.train_modules(model, ["norm", "embed"])[0].data.add_(0.1)
        shake(model)
        adapters.save_adapter(model, tmp_path / name, str(tmp_path / "base"))
    adapters.save_prompt(model, Prompt.from_tokens(model, torch.arange(3)), tmp_path / "prompt", str(tmp_path / "base"))
    return tmp_path


def generated(capsys, *words):
    """What `generate --json` writes."""
    start = ["generate", "--prompt", "def f(x)", "--max-new-tokens", "8", "--threads", "1", "--json"]
    assert command([*start, *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    """The one line of a refusal."""
    assert command([*map(str, words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def on_base(home, *names, weights=None):
    """The base with these adapters merged."""
    model = load.llama(home / "base")
    for name in names:
        adapters.load_adapter(model, home / name, name)
    lora.activate(model, weights or dict.fromkeys(names, 1.0))
    return model


def near(mine, theirs):
    return mine.shape == theirs.shape and (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_answers_next_to_the_base(home, capsys, monkeypatch):
    base, low, more = (generated(capsys, "--model", home / name)[0]["text"] for name in ("base", "lora", "tokens"))
    assert len({base, low, more}) == 3
    (row,) = generated(
        capsys, "--model", home / "base", "--adapter", home / "tokens", "--adapter", home / "lora", "--compare"
    )
    assert row["answers"] == {"base": base, str(home / "tokens"): more, str(home / "lora"): low}
    assert generated(capsys, "--adapter", home / "lora")[0]["text"] == low
    assert generated(capsys, "--model", home / "lora", "--compare")[0]["answers"] == {
        "base": base,
        str(home / "lora"): low,
    }
    words = ["generate", "--model", str(home / "lora"), "--compare", "--prompt", "def f(x)", "--max-new-tokens", "8"]
    monkeypatch.setenv("COLUMNS", "200")
    assert command([*words, "--system", "Be short."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "def f(x)"
    assert re.match("base +/", lines[2]), "two columns"
    assert any(set(line) == {"─", " "} for line in lines)
    monkeypatch.setenv("COLUMNS", "80")
    assert command(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.index("base") < next(i for i, text in enumerate(lines) if text.startswith(str(home))), "stacked"
    assert refused(capsys, *words, "--no-chat", "--system", "x").endswith("--system needs a chat template")
    assert "one with --adapter" in refused(capsys, "generate", "--model", home / "base", "--compare", "--prompt", "x")
    assert "given twice" in refused(capsys, *words, "--adapter", home / "lora")


def test_generation_behind_a_trained_prompt(home, capsys):
    """Alone, and next to the base and a LoRA adapter, which it must not change."""
    model, tokenizer = load.llama(home / "base"), load.tokenizer(home / "base")
    row, part = tokenizer.encode("def f(x)"), Prompt.from_tokens(model, torch.arange(3))
    start, stops = len(row), stop_ids(model, tokenizer)
    with torch.no_grad():
        while len(row) < start + 8 and row[-1] not in stops:
            row.append(int(part(model, torch.tensor([row]))[0, -1].argmax()))
    base, low = (generated(capsys, "--no-chat", "--model", home / name)[0]["text"] for name in ("base", "lora"))
    wanted = {"base": base, str(home / "prompt"): answer_text(tokenizer, row[start:], stops), str(home / "lora"): low}
    assert len({*wanted.values()}) == 3
    assert generated(capsys, "--no-chat", "--model", home / "prompt")[0]["text"] == wanted[str(home / "prompt")]
    words = ["--no-chat", "--adapter", home / "prompt", "--adapter", home / "lora", "--compare"]
    assert generated(capsys, *words)[0]["answers"] == wanted


def test_the_folder_of_a_run_is_its_model(home, capsys):
    """And a run that ended before its model was saved is named."""
    info = registry.find("sft")
    settings = run_folder.begin(info, registry.load(info).Config(), False)
    for name in ("lora", "base", "none"):
        (home / "runs" / name).mkdir(parents=True)
        settings.write(home / "runs" / name)
        if name != "none":
            (home / name).rename(home / "runs" / name / "model")
    words = ("--base", home / "runs" / "base")
    low = generated(capsys, "--model", home / "runs" / "lora", *words)
    assert low == generated(capsys, "--adapter", home / "runs" / "lora", "--model", home / "runs" / "base")
    assert "run that has no model" in refused(capsys, "generate", "--model", home / "runs" / "none", "--prompt", "x")
    assert command(["merge", str(home / "runs" / "lora"), *map(str, words), "--out", str(home / "merged")]) == 0


@pytest.mark.parametrize(
    ("names", "weights", "dtype"),
    [
        (["lora"], [], None),
        (["dora"], [], None),
        (["tokens"], [], None),
        (["lora"], [0.5], None),
        (["lora"], [], "bfloat16"),
    ],
)
def test_a_merged_folder_answers_as_the_adapter(home, capsys, names, weights, dtype):
    words = ["merge", *(str(home / name) for name in names), "--out", str(home / "merged"), "--json"]
    words += [] if dtype else ["--gguf", "f16"]
    words += [word for w in weights for word in ("--weight", str(w))] + (["--dtype", dtype] if dtype else [])
    assert command(words) == 0
    done = json.loads(capsys.readouterr().out)
    want = on_base(home, *names, weights=dict(zip(names, weights, strict=True)) if weights else None)
    merged = load.llama(home / "merged")
    assert done["dtype"] == (dtype or "float32")
    if dtype:
        lora.merge(want)
        stored = dict(weights_of(home / "merged"))
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        for mine, exact in zip(merged.parameters(), want.parameters(), strict=True):
            assert (mine - exact).abs().max() <= 2**-7 * exact.abs().max()
    else:
        assert near(merged(TOKENS), want(TOKENS))
        assert done["gguf"] == str(home / "merged" / "merged-f16.gguf")
        assert generated(capsys, "--model", done["gguf"])[0]["text"]
        assert (load.llama(done["gguf"])(TOKENS) - want(TOKENS)).abs().max() <= 0.01 * want(TOKENS).abs().max()
    assert (home / "merged" / "generation_config.json").exists()
    assert load.tokenizer(home / "merged").chat_template == load.tokenizer(home / "base").chat_template
    assert generated(capsys, "--model", home / "merged")[0]["text"]
    assert not [path for path in home.iterdir() if path.name.startswith(".finetune")]


def test_several_adapters_are_added(home, capsys):
    (home / "lora").rename(home / "one")
    model = load.llama(home / "base")
    lora.apply_lora(model, 3, 8, generator=torch.Generator().manual_seed(9), targets=("q", "head"))
    shake(model)
    adapters.save_adapter(model, home / "two", str(home / "base"))
    words = [
        "merge",
        str(home / "one"),
        str(home / "two"),
        "--weight",
        "0.5",
        "--weight",
        "2",
        "--out",
        str(home / "sum"),
    ]
    assert command(words) == 0
    want = on_base(home, "one", "two", weights={"one": 0.5, "two": 2.0})
    assert near(load.llama(home / "sum")(TOKENS), want(TOKENS))


def test_what_is_not_merged(home, capsys):
    out = ["--out", home / "new"]
    assert "prompt tuning adapter (PROMPT_TUNING)" in refused(capsys, "merge", home / "prompt", *out)
    assert "is not an adapter" in refused(capsys, "merge", home / "base", *out)
    assert "is given twice" in refused(capsys, "merge", home / "lora", home / "lora", *out)
    assert "2 weights for 1" in refused(capsys, "merge", home / "lora", "--weight", 1, "--weight", 2, *out)
    assert "'adapter0' holds" in refused(capsys, "merge", home / "tokens", home / "lora", *out)
    assert "base is not empty" in refused(capsys, "merge", home / "lora", "--out", home / "base")
    save.model(tiny(dim=48), home / "wider", Tokenizer.train([TEXT], 300))
    line = refused(capsys, "merge", home / "lora", "--base", home / "wider", *out)
    assert re.search(r"lora_A of blocks.* is \(2, 64\) instead of \(2, 48\).*adapter of this model.*wider", line)
    save.model(tiny(layers=1), home / "flat", Tokenizer.train([TEXT], 300))
    assert "layer blocks.1." in refused(capsys, "merge", home / "lora", "--base", home / "flat", *out)
    (home / "base").rename(home / "moved")
    assert re.search(
        "base model of the adapter .* is not found .*: give it with --base",
        refused(capsys, "merge", home / "lora", *out),
    )
    assert not (home / "new").exists()
    assert command([*map(str, ["merge", home / "lora", "--base", home / "moved", *out])]) == 0


def test_merging_into_a_gguf(home, capsys):
    file = home / "base.gguf"
    write(file, load.llama(home / "base"), tokenizer=load.tokenizer(home / "base"))
    assert command(["merge", str(home / "lora"), "--base", str(file), "--out", str(home / "merged")]) == 0
    model = load.llama(file)
    adapters.load_adapter(model, home / "lora")
    assert near(load.llama(home / "merged")(TOKENS), model(TOKENS))


@pytest.mark.peer
def test_transformers_opens_the_merged_folder(home):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert command(["merge", str(home / "tokens"), "--out", str(home / "merged")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(home / "merged")
    assert near(on_base(home, "tokens")(TOKENS), theirs(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(home / "merged").chat_template


# --- Training further, and what a run says one can do next


def trained(capsys, home, out, *words):
    """The lines of `run sft` on ten rows, two steps."""
    rows = [json.dumps({"prompt": f"What is {i}?", "completion": f"def {i}"}) for i in range(10)]
    (home / "rows.jsonl").write_text("\n".join(rows))
    start = ["run", "sft", "--data", home / "rows.jsonl", "--out", out, "--steps", 2, "--batch", 2, "--max-length", 64]
    small = ["--eval-rows", 2, "--samples", 1, "--eval-every", 0, "--threads", 1]
    code = command([*map(str, [*start, *small, *words])])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out.splitlines()


def test_from_a_run_to_its_next_commands(home, capsys, monkeypatch):
    """sft on the base, the lines that it prints, that adapter trained further, and merged."""
    monkeypatch.chdir(home)
    lines = trained(
        capsys, home, home / "a run", "--model", "base", "--modules-to-save", "norm", "--targets", "q_proj,head"
    )
    said = [line.removeprefix("python -m finetune ") for line in lines if line.startswith("python -m finetune ")]
    assert [words.split()[0] for words in said] == ["generate", "generate", "merge"]
    assert list(FORMS) == list(gguf_write.FORMATS)
    assert lines[-1] == f"python -m finetune {said[-1]}"
    for words in said:
        assert command([*shlex.split(words), *(["--max-new-tokens", "4"] if "generate" in words else [])]) == 0, words
    first, merged = load.llama(home / "base"), load.llama(home / "a run-merged")
    adapters.load_adapter(first, home / "a run" / "model")
    assert near(merged(TOKENS), first(TOKENS))
    assert json.loads((home / "a run" / "model" / "adapter_config.json").read_text())["modules_to_save"] == [
        "model.norm"
    ]
    capsys.readouterr()
    lines = trained(capsys, home, home / "more", "--adapter", home / "a run")
    assert any("rank 8, alpha 16, q,head, on" in line for line in lines)
    ends = [json.loads((home / name / "summary.json").read_text())["metrics"] for name in ("a run", "more")]
    assert ends[1]["loss_before"] == pytest.approx(ends[0]["held_out_loss"], rel=1e-5), "it begins where that ended"
    moved = load.llama(home / "base")
    adapters.load_adapter(moved, home / "more" / "model")
    assert not near(moved(TOKENS), first(TOKENS))
    assert not torch.equal(moved.norm.weight, first.norm.weight)


def test_what_one_does_next_with_a_whole_model():
    sft = registry.load(registry.find("sft"))
    full = sft.next_commands(sft.Config(method="full"), Path("/a run"))
    assert [shlex.split(words)[:2] for _, words in full] == [["generate", "--model"], ["export", "/a run"]]
    assert "--out '/a run-q8_0.gguf'" in full[1][1]
    assert sft.next_commands(sft.Config.toy(), Path("/a run")) == full[:1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", 4], "--rank 4: the adapter .* has 2, and is trained with that; omit --rank"),
        (["--targets", "q,v"], "--targets q,v: the adapter .* has q,k,v,o,gate,up,down"),
        (["--method", "full"], "omit --method full"),
        (["--modules-to-save", "norm"], "keeps its own"),
        (["--model", "base", "--adapter", "base"], "base is not an adapter: .* holds a whole model"),
        (["--adapter", "prompt"], "only LoRA adapters are trained further"),
        (["--adapter", "lost"], "base model of the adapter .* is not found .*: give it with --model"),
    ],
)
def test_what_is_not_trained_further(home, capsys, monkeypatch, words, message):
    monkeypatch.chdir(home)
    adapters.save_adapter(on_base(home, "lora"), home / "lost", str(home / "nowhere"), "lora")
    start = ["run", "sft", "--data", home / "base" / "config.json", "--out", home / "run", "--adapter", home / "lora"]
    assert re.search(message, refused(capsys, *start, *words))


def test_a_resumed_run_on_an_adapter(home, capsys):
    """Ends as one that was not stopped, and refuses an adapter that has changed."""
    given = ["--adapter", home / "lora", "--checkpoint-every", 1, "--dropout", 0.1]
    trained(capsys, home, home / "whole", *given)
    trained(capsys, home, home / "parts", *given)
    (home / "parts" / "summary.json").unlink()
    shutil.rmtree(home / "parts" / "checkpoints" / "step_000002")
    assert command(["run", "sft", "--resume", "--out", str(home / "parts")]) == 0
    ends = [dict(weights_of(home / name / "model", adapters.TENSORS)) for name in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    (home / "parts" / "summary.json").unlink()
    file = home / "lora" / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    capsys.readouterr()
    assert "adapter (" in refused(capsys, "run", "sft", "--resume", "--out", home / "parts")
