"""The module sft: loss and accumulation against definitions; that it learns; resume; what it leaves behind."""

import copy
import csv
import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from finetune import data, ops, registry
from finetune.adapters import load_adapter
from finetune.errors import UserError
from finetune.generate import generate
from finetune.llama import Llama, LlamaConfig, to_hf
from finetune.lora import apply_lora
from finetune.run import execute
from finetune.tokenizer import Tokenizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
sft = registry.load(registry.find("sft"))


def toy(**changes):
    return dataclasses.replace(sft.Config.toy(), threads=1, **changes)


def run(folder, **changes):
    return execute(registry.find("sft"), toy(**changes), folder, toy=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "run"
    return folder, run(folder)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return Llama(LlamaConfig(60, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=64, **changes))


def documents(lengths, learnt, seed=0):
    """Random tokens; the last `learnt[i]` of document i carry loss."""
    draw = random.Random(seed)
    return [
        data.Document([draw.randrange(60) for _ in range(n)], [0] * (n - k) + [1] * k)
        for n, k in zip(lengths, learnt, strict=True)
    ]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the loss


def test_loss_is_that_of_each_document_alone():
    """By the definition, one unpacked document after the other, with torch's own cross entropy of all logits."""
    model, parts = small(), documents([9, 14, 5], [3, 6, 1])
    want = torch.zeros(())
    for d in parts:
        ids = torch.tensor([d.ids])
        logits = model(ids)[0, :-1]
        picked = torch.tensor(d.mask[1:], dtype=torch.bool)
        want = want + F.cross_entropy(logits[picked], ids[0, 1:][picked], reduction="sum")
    got = sft.sft_loss(model, data.collate(parts), "sum")
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert sft.sft_loss(model, data.collate(parts)).item() == pytest.approx(want.item() / 10, rel=1e-5)


def test_questions_carry_no_loss():
    model, (d,) = small(), documents([12], [4])
    batch = data.collate([d])
    assert batch.learnt == 4
    unread = batch.targets[0] == data.IGNORE
    hidden = model(batch.tokens, hidden=True).detach().requires_grad_()
    ops.linear_cross_entropy(hidden[0], model.head_weight, batch.targets[0]).backward()
    assert not hidden.grad[0][unread].any()
    assert hidden.grad[0][~unread].abs().sum(-1).all()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_one_large_batch(parts):
    """Unequal lengths and unequal numbers of learnt tokens: the mean must be over tokens, not over parts."""
    docs = documents([9, 14, 5, 20, 7, 11, 30, 6], [1, 9, 2, 3, 5, 1, 20, 2])
    whole, split = small().double(), small().double()
    with ops.use_backend("reference"):
        loss = sft.accumulate_gradients(whole, [data.collate(docs)])
        size = len(docs) // parts
        batches = [data.collate(docs[i : i + size]) for i in range(0, len(docs), size)]
        assert sft.accumulate_gradients(split, batches) == pytest.approx(loss, rel=1e-9)
    for name, g in gradients(whole).items():
        assert torch.allclose(gradients(split)[name], g, atol=1e-10), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(method):
    batch = data.collate(documents([9, 14], [4, 5]))
    found = []
    for checkpointing in (False, True):
        model = small()
        if method == "lora":
            apply_lora(model, generator=torch.Generator().manual_seed(0))
        model.gradient_checkpointing = checkpointing
        sft.accumulate_gradients(model, [batch])
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == (28 if method == "lora" else 20)
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.peer
def test_gradients_equal_those_of_transformers_and_torch(smollm2_peer, smollm2_model, smollm2_tokenizer):
    """The loss of SFT on SmolLM2, packed here, padded there: relative 1e-4.

    Per parameter against transformers in float64: its own fp32 gradients are 1.05e-4 away from those in the worst
    norm weight, ours 1.6e-5 (3e-5 and 3e-6 over all parameters together).
    """
    rows = [
        [{"role": "user", "content": "What is a tuple?"}, {"role": "assistant", "content": "An immutable sequence."}],
        [{"role": "user", "content": "And a list?"}, {"role": "assistant", "content": "A mutable one, made by [ ]."}],
    ]
    docs, _, _ = data.tokenize(rows, smollm2_tokenizer.render, 256)
    width = max(map(len, docs))
    ids = torch.tensor([[*d.ids, *[0] * (width - len(d))] for d in docs])
    mask = torch.tensor([[1] * len(d) + [0] * (width - len(d)) for d in docs])
    labels = torch.tensor(
        [[t if m else -100 for t, m in zip(d.ids, d.mask, strict=True)] + [-100] * (width - len(d)) for d in docs]
    )

    def theirs(model):
        logits = model(ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        names, parameters = zip(*model.named_parameters(), strict=True)
        return loss.item(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    try:
        got_loss = sft.accumulate_gradients(smollm2_model, [data.collate(docs)])
        got = {to_hf(name): g for name, g in gradients(smollm2_model).items()}
    finally:
        smollm2_model.zero_grad(set_to_none=True)
    want_loss, want = theirs(smollm2_peer)
    assert got_loss == pytest.approx(want_loss, rel=1e-4)
    assert got.keys() == want.keys()
    whole = math.sqrt(sum(g.norm().item() ** 2 for g in want.values()))
    assert math.sqrt(sum((got[name] - want[name]).norm().item() ** 2 for name in want)) <= 1e-4 * whole
    exact_loss, exact = theirs(copy.deepcopy(smollm2_peer).double())
    assert got_loss == pytest.approx(exact_loss, rel=1e-5)
    for name, g in exact.items():
        assert (got[name] - g).norm() <= 1e-4 * g.norm(), name


# --- it learns


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_toy_answers_held_out_questions(tmp_path, trained, seed):
    summary = trained[1] if seed == 0 else run(tmp_path / "run", seed=seed)
    assert summary["passed"]
    assert summary["baseline"]["held_out_accuracy"] == 0.1
    assert summary["metrics"]["held_out_accuracy"] >= 0.9
    assert summary["metrics"]["held_out_loss"] < 0.2 * summary["metrics"]["loss_before"]


def test_accuracy_is_what_greedy_decoding_answers(trained):
    """The teacher-forced share of right answers in summary.json, against real generation from the saved model."""
    folder, summary = trained
    model, tokenizer = Llama.from_pretrained(folder / "model"), Tokenizer.from_pretrained(folder / "model")
    rows = sft.load_data(toy())["held_out"]
    prompts = [tokenizer.render(row[:-1], add_generation_prompt=True)[0] for row in rows]
    new = generate(model, prompts, 8, stop_ids=[tokenizer.eos_id])
    right = [tokenizer.decode(ids, True) == row[-1]["content"] for ids, row in zip(new, rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(summary["metrics"]["held_out_accuracy"])


def test_destroyed_data_falls_to_chance(tmp_path):
    summary = run(tmp_path / "run", shuffle_answers=True)
    assert not summary["passed"]
    assert summary["metrics"]["held_out_accuracy"] < 0.3


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 5, "lr": 0.0}])
def test_without_training_there_is_no_gain(tmp_path, change):
    summary = run(tmp_path / "run", **change)
    assert summary["metrics"]["held_out_loss"] == summary["metrics"]["loss_before"]
    assert summary["passed"] is False


@pytest.mark.parametrize(
    "change",
    [
        {"method": "lora", "rank": 16, "lr": 1e-2, "dropout": 0.1},
        {"dtype": "bfloat16", "steps": 40},
        {"accumulate": 4, "checkpointing": True},
        {"packing": False, "batch": 40},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_variant_learns(tmp_path, change):
    summary = run(tmp_path / "run", **{"steps": 100, **change})
    assert summary["metrics"]["held_out_loss"] < 0.7 * summary["metrics"]["loss_before"]


# --- what it leaves behind


def test_run_folder(trained):
    folder, summary = trained
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(r["step"]) for r in rows if r["loss"]] == list(range(200))
    losses = [float(r["held_out_loss"]) for r in rows if r["held_out_loss"]]
    assert len(losses) == 1 + 200 // 25
    assert losses[0] == summary["baseline"]["held_out_loss"]
    assert losses[-1] == summary["metrics"]["held_out_loss"]
    assert (folder / "training_curves.png").stat().st_size > 20_000
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")
    samples = json.loads((folder / "samples.json").read_text())[0]["rows"]
    assert len(samples) == 4
    assert sum(row["after"] == row["wanted"] for row in samples) >= 3
    assert all(row["before"] != row["wanted"] for row in samples)
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pkl", ".bin")]


def test_memory_is_predicted(trained):
    rows = {row["name"]: row for row in trained[1]["memory"]}
    for name in ("weights", "gradients", "optimizer states"):
        assert rows[name]["predicted"] == rows[name]["measured"] > 0
    assert rows["activations"]["predicted"] == pytest.approx(rows["activations"]["measured"], rel=0.05)


def test_the_briefs_numbers_are_in_the_summary(trained):
    brief = tomllib.loads((ROOT / "modules/post_train/alignment/sft/interview.toml").read_text())["brief"]["en"]
    summary = trained[1]
    for field in re.findall(r"\{([a-z_.]+)\}", brief):
        group, _, name = field.rpartition(".")
        known = summary[group] if group else {**summary, **summary["metrics"]}
        assert isinstance(known[name], (int, float)), field


@pytest.mark.peer
def test_saved_model_opens_in_transformers(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained[0] / "model"
    theirs, mine = AutoModelForCausalLM.from_pretrained(folder), Llama.from_pretrained(folder)
    text = "<|im_start|>user\nTell me the floor of Ada.<|im_end|>\n<|im_start|>assistant\n"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == Tokenizer.from_pretrained(folder).encode(text)
    want = theirs(ids).logits
    assert (mine(ids) - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.slow
def test_smollm2_adapter(tmp_path, smollm2, smollm2_tokenizer):
    """Two steps on SmolLM2: the adapter it saves gives the trained model back, and the base is untouched."""
    config = sft.Config(steps=2, warmup=0, eval_rows=2, samples=0, threads=2)
    before = (smollm2 / "model.safetensors").read_bytes()[:1000]
    summary = execute(registry.find("sft"), config, tmp_path / "run")
    assert summary["metrics"]["held_out_loss"] < summary["metrics"]["loss_before"]
    assert (smollm2 / "model.safetensors").read_bytes()[:1000] == before
    model = Llama.from_pretrained(smollm2)
    load_adapter(model, tmp_path / "run" / "model")
    sets = sft.load_data(config)
    docs = {"held_out": data.tokenize(sets["held_out"], smollm2_tokenizer.render, config.max_length)[0]}
    assert sft.evaluate(model, docs, config)["held_out_loss"] == pytest.approx(
        summary["metrics"]["held_out_loss"], 1e-5
    )


# --- resume, bad input


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def start(folder, *more):
    command = [sys.executable, "-m", "finetune", "run", "sft", "--toy", "--out", str(folder), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bits(tmp_path):
    """kill -9 at ten random moments of one run, each resumed; and a run that nobody interrupted."""
    given = {"steps": 240, "checkpoint-every": 3, "eval-every": 0, "samples": 0, "eval-rows": 4, "threads": 1}
    settings = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert start(tmp_path / "whole", *settings).wait() == 0
    draw, kills = random.Random(0), 0
    more = settings
    while kills < 10:
        process = start(tmp_path / "killed", *more)
        folder, at = tmp_path / "killed" / "checkpoints", time.monotonic()
        seen = {p.name for p in folder.glob("step_*")} if folder.exists() else set()
        while process.poll() is None and time.monotonic() - at < 120:
            if folder.exists() and {p.name for p in folder.glob("step_*")} - seen:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before kill {kills + 1}: {process.stderr.read()}"
        kills += 1
        more = ["--resume"]
    finish = start(tmp_path / "killed", "--resume")
    assert finish.wait() == 0, finish.stderr.read()
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "killed/metrics.csv").read_bytes()


def test_same_seed_same_bytes(trained, tmp_path):
    run(tmp_path / "again")
    assert (tmp_path / "again/metrics.csv").read_bytes() == (trained[0] / "metrics.csv").read_bytes()
    first, again = (folder / "model/model.safetensors" for folder in (trained[0], tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "--batch 0 is too small"),
        ({"accumulate": 9}, "--accumulate 9"),
        ({"method": "lora", "targets": "q,x"}, "--targets: 'x' is no linear layer"),
        ({"model": "smollm2", "max_length": 9000}, "--max-length 9000: the model's own is 8192"),
        ({"max_length": 10}, "no row has an answer within 10 tokens"),
        ({"lr": 1e38, "warmup": 0}, "became nan|became inf"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **change)


def test_own_data(tmp_path):
    rows = [{"prompt": f"What comes after {i}?", "completion": str(i + 1)} for i in range(60)]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    summary = run(tmp_path / "run", data=file, steps=60)
    train, held_out = sft.split(data.read_jsonl(file), file)
    assert (len(train), len(held_out)) == (57, 3)
    assert summary["metrics"]["held_out_loss"] < summary["metrics"]["loss_before"]
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]))
    with pytest.raises(UserError, match="one row only"):
        run(tmp_path / "other", data=file)
