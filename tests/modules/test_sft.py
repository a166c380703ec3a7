"""The module sft: loss and accumulation against definitions; that it learns; resume; what it leaves behind."""

import copy
import csv
import dataclasses
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from seeds import THREE
from small_gguf import TEXT, tiny, write
from tokenizers import models, pre_tokenizers, trainers

from finetune import chat, cli, ops
from finetune.data import conversations, packing
from finetune.data import rows as row_files
from finetune.errors import UserError
from finetune.inference.generate import generate
from finetune.interview import brief as briefs
from finetune.lm.chat_template import TEMPLATES
from finetune.lm.io import load, save
from finetune.lm.io.hf_llama import to_hf
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import GPT2, Tokenizer, byte_level
from finetune.peft import whole
from finetune.peft.adapters import load_adapter, save_adapter
from finetune.peft.lora import apply_lora
from finetune.runs import registry
from finetune.runs.config import describe
from finetune.runs.run import execute

ROOT = Path(__file__).parents[2]
sft = registry.load(registry.find("sft"))
data = registry.part("sft", "data")


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


def documents(lengths, learned, seed=0):
    """Random tokens; the last `learned[i]` of document i carry loss."""
    draw = random.Random(seed)
    return [
        packing.Document([draw.randrange(60) for _ in range(n)], [0] * (n - k) + [1] * k)
        for n, k in zip(lengths, learned, strict=True)
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
    got = sft.sft_loss(model, packing.collate(parts), "sum")
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert sft.sft_loss(model, packing.collate(parts)).item() == pytest.approx(want.item() / 10, rel=1e-5)


def test_questions_carry_no_loss():
    model, (d,) = small(), documents([12], [4])
    batch = packing.collate([d])
    assert batch.learned == 4
    unread = batch.targets[0] == packing.IGNORE
    hidden = model(batch.tokens, hidden=True).detach().requires_grad_()
    ops.linear_cross_entropy(hidden[0], model.head_weight, batch.targets[0]).backward()
    assert not hidden.grad[0][unread].any()
    assert hidden.grad[0][~unread].abs().sum(-1).all()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_one_large_batch(parts):
    """Unequal lengths and unequal numbers of learned tokens: the mean must be over tokens, not over parts."""
    docs = documents([9, 14, 5, 20, 7, 11, 30, 6], [1, 9, 2, 3, 5, 1, 20, 2])
    whole, split = small().double(), small().double()
    with ops.use_backend("reference"):
        loss = sft.accumulate_gradients(whole, [packing.collate(docs)])
        size = len(docs) // parts
        batches = [packing.collate(docs[i : i + size]) for i in range(0, len(docs), size)]
        assert sft.accumulate_gradients(split, batches) == pytest.approx(loss, rel=1e-9)
    for name, g in gradients(whole).items():
        assert torch.allclose(gradients(split)[name], g, atol=1e-10), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(method):
    batch = packing.collate(documents([9, 14], [4, 5]))
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
    docs = packing.tokenize(rows, smollm2_tokenizer, 256)
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
        got_loss = sft.accumulate_gradients(smollm2_model, [packing.collate(docs)])
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


@pytest.mark.parametrize("seed", THREE)
def test_toy_answers_held_out_questions(tmp_path, trained, seed):
    summary = trained[1] if seed == 0 else run(tmp_path / "run", seed=seed)
    assert summary["passed"]
    assert summary["baseline"]["held_out_accuracy"] == 0.1
    assert summary["metrics"]["held_out_accuracy"] >= 0.9
    assert summary["metrics"]["held_out_loss"] < 0.2 * summary["metrics"]["loss_before"]


def test_accuracy_is_what_greedy_decoding_answers(trained):
    """The teacher-forced share of right answers in summary.json, against real generation from the saved model."""
    folder, summary = trained
    model, tokenizer = load.llama(folder / "model"), load.tokenizer(folder / "model")
    rows = data.load_data(toy())["held_out"]
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
    summary = run(tmp_path / "run", **{"steps": 50, "eval_rows": 32, "samples": 0, **change})
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


def test_the_brief_speaks_this_run(trained):
    for lang in ("en", "zh"):
        said = briefs.brief(registry.find("sft"), lang, trained[0])
        assert len(said) > 300
        assert "{" not in said


@pytest.mark.peer
def test_saved_model_opens_in_transformers(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained[0] / "model"
    theirs, mine = AutoModelForCausalLM.from_pretrained(folder), load.llama(folder)
    text = "<|im_start|>user\nTell me the floor of Ada.<|im_end|>\n<|im_start|>assistant\n"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == load.tokenizer(folder).encode(text)
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
    model = load.llama(smollm2)
    load_adapter(model, tmp_path / "run" / "model")
    sets = data.load_data(config)
    docs = {"held_out": packing.tokenize(sets["held_out"], smollm2_tokenizer, config.max_length)}
    assert sft.evaluate(model, docs, config)["held_out_loss"] == pytest.approx(
        summary["metrics"]["held_out_loss"], 1e-5
    )


# --- resume, bad input


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_same_seed_same_bytes(tmp_path):
    for name in ("first", "again"):
        run(tmp_path / name, steps=20, eval_every=10, eval_rows=16, samples=1)
    for name in ("metrics.csv", "samples.json", "model/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "--batch 0 is too small"),
        ({"accumulate": 9}, "--accumulate 9 exceeds the batch of 8 rows"),
        ({"method": "lora", "targets": "q,x"}, "--targets: 'x' is not a linear layer"),
        ({"model": "smollm2", "max_length": 9000}, "--max-length 9000: the model's own is 8192"),
        ({"max_length": 10}, "no row has an answer within 10 tokens"),
        ({"lr": 1e38, "warmup": 0}, "became nan|became inf"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **change)


@pytest.fixture
def own_model(tmp_path):
    """A small chat model with a list of end tokens; its tokenizer."""
    tokenizer = Tokenizer.train([TEXT], 300)
    model = tiny()
    model.token_ids = {"bos_token_id": 1, "eos_token_id": [0, 2]}
    save.model(model, tmp_path / "model", tokenizer)
    return tmp_path / "model", tokenizer


def pair(i, words=1):
    return {"prompt": f"{'What ' * words}comes after {i}?", "completion": str(i + 1)}


def tuned(tmp_path, model, rows, **changes):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": str(model),
        "data": file,
        "steps": 2,
        "batch": 2,
        "max_length": 96,
        "eval_rows": 4,
        "threads": 1,
    }
    config = sft.Config(**(settings | {"eval_every": 0, "samples": 2} | changes))
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    return execute(registry.find("sft"), config, folder), folder


def test_a_gguf_trains_as_a_folder_does(tmp_path, own_model):
    """To the end, memory included, and to the same adapter."""
    folder, tokenizer = own_model
    file = write(tmp_path / "model.gguf", load.llama(folder), tokenizer=tokenizer)
    assert load.llama_config(file) == load.llama_config(folder) == load.llama(folder).config
    rows = [pair(i) for i in range(30)]
    kept = load.tokenizer(folder).chat_template
    runs = []
    for model in (folder, file):
        if model == file:  # the test's writer gives it none
            with pytest.raises(UserError, match="no chat template"):
                tuned(tmp_path, file, rows)
            file = write(tmp_path / "model.gguf", load.llama(folder), tokenizer=tokenizer,
                         extra={"tokenizer.chat_template": kept})  # fmt: skip
        summary, out = tuned(tmp_path, model, rows)
        assert {row["name"] for row in summary["memory"]} >= {"weights", "activations"}
        runs.append(load_file(out / "model" / "adapter_model.safetensors"))
    assert all(torch.equal(runs[0][name], tensor) for name, tensor in runs[1].items())
    from finetune.memory.cli import plan

    assert plan("sft", ["--model", str(file)]) == plan("sft", ["--model", str(folder)])


def test_chats_of_any_shape_end_well(tmp_path, own_model):
    """Longer than the model, begun by the assistant, ended by the user, a held-out row that does not fit."""
    turns = [{"role": ("user", "assistant")[j % 2], "content": f"turn {j}: hello how are you"} for j in range(30)]
    rows = [{"messages": [{"role": "user", "content": f"chat {i}"}, turns[1], *turns]} for i in range(8)]
    summary, folder = tuned(tmp_path, own_model[0], rows)
    assert summary["metrics"]["held_out_loss"] > 0
    (sample,) = json.loads((folder / "samples.json").read_text())[0]["rows"]
    assert (sample["question"], sample["wanted"]) == (turns[0]["content"], turns[1]["content"]) or (
        sample["question"].startswith("turn") and int(sample["question"].split()[1][:-1]) + 1
        == int(sample["wanted"].split()[1][:-1])
    )  # fmt: skip

    greetings = [{"messages": [{"role": "assistant", "content": f"Hello, I am bot {i}."}]} for i in range(20)]
    _, folder = tuned(tmp_path, own_model[0], greetings)
    assert not (folder / "samples.json").exists()

    thanks = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"},
                            {"role": "user", "content": f"thanks {i}"}]} for i in range(20)]  # fmt: skip
    _, folder = tuned(tmp_path, own_model[0], thanks)
    for sample in json.loads((folder / "samples.json").read_text())[0]["rows"]:
        assert sample["wanted"] == "a" + sample["question"].removeprefix("q")

    short = [pair(i) for i in range(14)]
    long = next(
        row for row in (pair(i, words=200) for i in range(1000)) if row in [
            {"prompt": r[0]["content"], "completion": r[1]["content"]}
            for r in data.split([conversations.read_row(x) for x in [*short, row]], tmp_path)[1]
        ]
    )  # fmt: skip
    summary, _ = tuned(tmp_path, own_model[0], [*short, long])
    assert summary["metrics"]["held_out_loss"] > 0
    with pytest.raises(UserError, match="one row only has an answer within 96 tokens"):
        tuned(tmp_path, own_model[0], [short[0], short[0], long])


def test_the_model_is_saved_before_what_can_fail(tmp_path, own_model, monkeypatch):
    def fail(*_, **named):
        raise UserError("no room for the picture")

    monkeypatch.setattr(sft.memory, "record_step", fail, raising=False)
    monkeypatch.setattr(sft, "report", fail)
    with pytest.raises(UserError, match="no room"):
        tuned(tmp_path, own_model[0], [pair(i) for i in range(20)], method="full")
    (saved,) = tmp_path.glob("run*/model")
    assert load.llama(saved).token_ids["eos_token_id"] == [0, 2]  # as it was
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_the_last_act_repeated_gives_the_same(tmp_path, own_model, monkeypatch):
    """A run that failed behind its last step, resumed: the same metrics, samples and bytes as one that did not."""
    rows, given = [pair(i) for i in range(40)], {"method": "lora", "eval_every": 1, "steps": 3, "dropout": 0.1}
    whole, first = tuned(tmp_path, own_model[0], rows, **given)
    with monkeypatch.context() as patch:
        patch.setattr(sft.memory, "record_step", lambda *_, **named: 1 / 0, raising=False)
        with pytest.raises(ZeroDivisionError):
            tuned(tmp_path, own_model[0], rows, **given)
    (second,) = set(tmp_path.glob("run*")) - {first}
    config = sft.Config(**given | {"model": str(own_model[0]), "data": tmp_path / "rows.jsonl", "batch": 2,
                                   "max_length": 96, "eval_rows": 4, "threads": 1, "samples": 2})  # fmt: skip
    again = execute(registry.find("sft"), config, second, resume=True)
    speeds = [summary["metrics"].pop("tokens_per_second") for summary in (whole, again)]
    assert min(speeds) > 0
    assert again["metrics"] == whole["metrics"]
    for name in ("metrics.csv", "samples.json", "model/adapter_model.safetensors", "model/tokenizer.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes(), name


def test_what_cannot_fit_is_refused_before_the_model_is_read(tmp_path, own_model, monkeypatch):
    monkeypatch.setattr(sft, "load_model", None)
    with pytest.raises(UserError, match=r"needs .* of memory by the formulas, .* are free"):
        tuned(tmp_path, own_model[0], [pair(i) for i in range(20)], batch=1 << 20, accumulate=1, max_length=120)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(UserError, match="is an adapter, not a model: give its base model"):
        tuned(tmp_path, tmp_path / "adapter", [pair(i) for i in range(20)])


@pytest.mark.parametrize(
    "change",
    [
        {"lr": -1e-3}, {"lr": math.nan}, {"dropout": 1.0}, {"dropout": -0.1}, {"clip": 0.0}, {"alpha": math.inf},
        {"warmup": -1}, {"weight_decay": -0.1}, {"max_length": 1 << 40}, {"batch": 1 << 40}, {"rank": 1 << 40},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range(change):
    (name,) = change
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
        sft.Config(**change)


def test_own_data(tmp_path):
    rows = [{"prompt": f"What comes after {i}?", "completion": str(i + 1)} for i in range(60)]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    summary = run(tmp_path / "run", data=file, steps=60)
    train, held_out = data.split(row_files.read(file)[0], file)
    assert (len(train), len(held_out)) == (57, 3)
    assert summary["metrics"]["held_out_loss"] < summary["metrics"]["loss_before"]
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]))
    with pytest.raises(UserError, match="one row only"):
        run(tmp_path / "other", data=file)


# --- rows, templates, a look at them before the run


@pytest.fixture
def base_model(tmp_path):
    """A small base model: one special token, no chat template."""
    backend = byte_level(models.BPE(), GPT2)
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    model = tiny(vocab_size=backend.get_vocab_size())
    model.token_ids = {"eos_token_id": 0}
    save.model(model, tmp_path / "base", Tokenizer(backend, bos="<|endoftext|>", eos="<|endoftext|>"))
    return tmp_path / "base"


def test_a_base_model_needs_a_template(tmp_path, base_model):
    with pytest.raises(UserError, match=r"^the model has no chat template: give one .--template chatml"):
        tuned(tmp_path, base_model, [pair(i) for i in range(20)])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_model_gets_chatml_and_its_tokens(tmp_path, base_model, method, capsys):
    """The new rows are trained, saved with the adapter or the model, and used by generate; it stops at <|im_end|>."""
    _, folder = tuned(tmp_path, base_model, [pair(i) for i in range(20)], template="chatml", method=method, steps=3)
    said = " ".join(capsys.readouterr().out.split())
    assert "new in the vocabulary: <|im_start|>, <|im_end|>" in said
    assert "the embeddings of <|im_start|>, <|im_end|> begin as means of others" in said
    tokenizer = load.tokenizer(folder / "model")
    assert tokenizer.chat_template == TEMPLATES["chatml"].source
    assert (tokenizer.eos, tokenizer.eos_id) == ("<|im_end|>", 291)
    if method == "lora":
        model = load.llama(base_model)
        load_adapter(model, folder / "model")
    else:
        model = load.llama(folder / "model")
        assert model.token_ids["eos_token_id"] == [291, 0]
    start = load.llama(base_model).embed.weight
    assert model.config.vocab_size == len(model.embed.weight) == 292
    assert not torch.equal(model.embed.weight[291], start[0])
    (answer,) = chat.answer(str(folder / "model"), ["What comes after 3?"], max_new_tokens=3)
    assert isinstance(answer, str)


def test_embeddings_that_do_not_fit_are_refused(tmp_path, base_model, monkeypatch):
    monkeypatch.setattr(sft.memory, "check_memory", lambda *_: None, raising=False)
    monkeypatch.setattr(sft.machine, "available_memory_bytes", lambda: 100_000)
    with pytest.raises(UserError, match=r"whole modules needs 2\d\d\.\d kB .*, 100\.0 kB are free: .*zephyr"):
        tuned(tmp_path, base_model, [pair(i) for i in range(20)], template="chatml")


@pytest.mark.parametrize(
    ("tied", "changes"),
    [
        (True, {"template": "chatml", "dtype": "bfloat16"}),
        (False, {"template": "chatml", "modules_to_save": "norm"}),
        (True, {"template": "zephyr", "targets": "q,lm_head", "modules_to_save": "embed_tokens"}),
    ],
)
def test_memory_of_whole_modules(tmp_path, base_model, tied, changes):
    """Of the first run, planned before the model is read, and of one that trains its adapter further: states to the
    byte, activations within 5 %."""
    model = load.llama(base_model)
    model = tiny(vocab_size=model.config.vocab_size, tied=tied)
    model.token_ids = {"eos_token_id": 0}
    save.model(model, base_model, load.tokenizer(base_model))
    rows, quick = [pair(i) for i in range(20)], {"steps": 1, "samples": 0, "dtype": changes.get("dtype", "float32")}
    first, folder = tuned(tmp_path, base_model, rows, **quick | changes)
    further, _ = tuned(tmp_path, base_model, rows, **quick, adapter=str(folder))
    well_predicted(first)
    lacking = 2 * (1 if tied else 2) * 64 * (2 if "dtype" in changes else 4)  # two rows of the base's tables
    well_predicted(further, lacking if "chatml" in changes.values() else 0)


def well_predicted(summary, more=0):
    found = {row["name"]: (row["predicted"], row["measured"]) for row in summary["memory"]}
    assert found["weights"][0] == found["weights"][1] + more
    for name in ("gradients", "optimizer states"):
        assert found[name][0] == found[name][1] > 0, name
    assert found["activations"][0] == pytest.approx(found["activations"][1], rel=0.05)


def test_memory_of_an_adapter_with_two_tables(tmp_path, own_model):
    """Embedding and head of a tied model apart, as peft trains them, and DoRA."""
    model = load.llama(own_model[0])
    apply_lora(model, 2, 4, dora=True)
    whole.untie(model)
    for p in whole.train_modules(model, ["embed", "head"]):
        p.data += torch.randn(p.shape)
    save_adapter(model, tmp_path / "adapter", str(own_model[0]))
    quick = {"steps": 1, "samples": 0, "adapter": str(tmp_path / "adapter")}
    well_predicted(tuned(tmp_path, own_model[0], [pair(i) for i in range(20)], **quick)[0])


def test_a_head_that_a_template_needs_has_no_adapter(tmp_path, base_model):
    with pytest.raises(UserError, match=r"--template chatml needs tokens .* omit it from --targets"):
        tuned(tmp_path, base_model, [pair(i) for i in range(20)], template="chatml", targets="q,head")


def test_a_template_without_new_tokens_trains_no_embeddings(tmp_path, base_model):
    _, folder = tuned(tmp_path, base_model, [pair(i) for i in range(20)], template="zephyr")
    assert not [name for name in load_file(folder / "model" / "adapter_model.safetensors") if "embed" in name]
    assert load.tokenizer(folder / "model").eos == "<|endoftext|>"


def test_what_a_template_drops_is_counted(tmp_path, own_model, capsys):
    """Refused with the count; or these rows are skipped, or learned without it, and that is said."""
    thinking = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}",
                 "reasoning_content": "r"}]} for i in range(7)]  # fmt: skip
    rows = [*[pair(i) for i in range(20)], *thinking]
    said = r"the chat template does not write 'reasoning_content' of message 1 .assistant.. In all, the chat template "
    said += r"does not write 'reasoning_content' of \d rows .\d+ in all.: --unwritten skip"
    with pytest.raises(UserError, match=rf"begins 'q\d': {said}"):
        tuned(tmp_path, own_model[0], rows)
    for choice, words in (("skip", "rows are skipped"), ("keep", "what it writes of them is learned")):
        tuned(tmp_path, own_model[0], rows, unwritten=choice, steps=0, samples=0)
        said = " ".join(capsys.readouterr().out.split())
        assert re.search(rf"train: the chat template does not write 'reasoning_content' of \d rows .*{words}", said)
        assert ("20 conversations in" in said or "19 conversations in" in said) == (choice == "skip")


def test_dry_run_shows_what_is_learned_and_stops(tmp_path, own_model, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def dry(*words):
        code = cli.main(["run", *map(str, words), "--dry-run"])
        return code, capsys.readouterr()

    file = tmp_path / "rows.jsonl"
    chats = [[{"from": "human", "value": f"What comes after {i}?"}, {"from": "gpt", "value": str(i + 1)}]
             for i in range(1, 5)]  # fmt: skip
    file.write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats))
    (own_model[0] / "model.safetensors").unlink()  # no weights are read
    given = ("--model", own_model[0], "--data", file, "--max-length", 96, "--out", tmp_path / "run")
    for module in ("sft", "peft"):
        code, (shown, _) = dry(module, *given)
        assert code == 0
        assert re.search(r"row \d: \d+ tokens, \d learned\n<\|im_start\|>user\nWhat comes after \d\?<\|im_end\|>\n"
                         r"<\|im_start\|>assistant\n«\d<\|im_end\|>»\n", shown)  # fmt: skip
        assert len(re.findall("^row ", shown, re.M)) == 3
        assert "what is between « and » is learned" in shown
        assert re.search(r"^train +3 +\d+ +\d+ +\d+\.\d%$", shown, re.M)
        assert max(map(len, shown.splitlines())) <= 80
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    colored = dry("sft", *given)[1].out
    assert "\x1b[1;32m2<|im_end|>\x1b[0m" in colored or "\x1b[1;32m3<|im_end|>\x1b[0m" in colored
    assert "«" not in colored
    monkeypatch.setenv("NO_COLOR", "1")
    assert "«" in dry("sft", *given)[1].out
    assert dry("mdp") == (2, ("", "error: --dry-run: mdp has no rows to show; sft and peft do\n"))
    assert dry("sft", "--resume")[1].err == "error: --dry-run shows rows before a run: omit --resume\n"


@pytest.mark.parametrize("module", ["sft", "peft"])
def test_the_help_and_the_readme_name_what_there_is(module):
    told = {field.name: field.help for field in describe(registry.load(registry.find(module)).Config)}
    readme = (registry.find("sft").folder / "README.md").read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", told["form"]) and f"| `{name}` |" in readme for name in conversations.FORMS)
    assert all(re.search(rf"\b{name}\b", told["template"]) and f"`{name}`" in readme for name in TEMPLATES)
    assert all(f"| `{name}` |" in readme for name in conversations.TRAIN_ON)
    assert all(end in told["data"] and f"`{end}`" in readme for end in row_files.FILES if end != ".ndjson")
