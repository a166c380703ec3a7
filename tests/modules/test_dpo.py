"""The module dpo: that it learns, what it must not learn from, references, bad input, what a run leaves behind."""

import csv
import dataclasses
import json

import httpx
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small_served import llama
from small_server import listening, trained_tokenizer

from finetune import chat
from finetune.alignment import logprobs
from finetune.alignment.logprobs import Reference
from finetune.alignment.openings import toy_openings
from finetune.data.packing import Document, collate
from finetune.errors import UserError
from finetune.inference.server import Server
from finetune.lm.io import load, save
from finetune.lm.llama import Llama, LlamaConfig
from finetune.peft import lora
from finetune.runs import registry
from finetune.runs.run import execute
from finetune.serve import started

dpo = registry.load(registry.find("dpo"))
data, losses, batches = (registry.part("dpo", name) for name in ("data", "losses", "batch"))
judged, reference, setup = (registry.part("dpo", name) for name in ("judged", "reference", "setup"))


def run(folder, **changes):
    config = dataclasses.replace(dpo.Config.toy(), threads=1, **changes)
    return execute(registry.find("dpo"), config, folder, toy=True)


def margin(summary):
    return summary["checks"]["held_out_margin"]["value"]


SMALL = {"prompts": 60, "eval_prompts": 40, "eval_pairs": 30, "samples": 8, "sample_every": 0, "sft_steps": 40}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "run"
    return folder, run(folder)


def test_toy_reaches_its_targets(trained):
    metrics, base = trained[1]["metrics"], trained[1]["baseline"]
    assert trained[1]["passed"]
    assert metrics["sample_reward"] >= base["sample_reward"] + 1.5
    assert metrics["sample_kl"] <= 10
    assert metrics["held_out_accuracy"] >= 0.8


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_reach_them_too(tmp_path, seed):
    assert run(tmp_path / "run", seed=seed)["passed"]


def test_the_chosen_answers_become_less_likely_and_the_sft_term_stops_it(tmp_path):
    """With a large learning rate the margin grows while both answers lose probability: it is all that the loss asks.
    With the chosen answer's cross entropy added it stays."""
    ends = {}
    for weight in (0.0, 1.0):
        summary = run(tmp_path / str(weight), lr=1e-3, steps=60, sft_weight=weight, sample_every=0, samples=16)
        ends[weight] = summary["metrics"]
    start = summary["baseline"]["held_out_chosen_logprob"]
    assert ends[0.0]["held_out_accuracy"] > 0.8
    assert ends[0.0]["held_out_chosen_logprob"] < start - 3
    assert ends[1.0]["held_out_accuracy"] > 0.8
    assert ends[1.0]["held_out_chosen_logprob"] > start - 1


def test_flipped_labels_flip_the_margin(tmp_path, trained):
    summary = run(tmp_path / "run", flipped=1.0, sample_every=0, samples=64)
    assert margin(summary) < -0.5 * margin(trained[1])
    assert summary["metrics"]["held_out_accuracy"] < 0.2
    assert summary["metrics"]["sample_reward"] < summary["baseline"]["sample_reward"] - 1
    assert not summary["passed"]


def test_destroyed_labels_teach_nothing(tmp_path):
    summary = run(tmp_path / "run", flipped=0.5, sample_every=0, samples=64)
    assert not summary["passed"]
    assert abs(summary["metrics"]["held_out_accuracy"] - 0.5) < 0.25


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 3, "lr": 0.0}])
def test_without_training_there_is_no_gain(tmp_path, change):
    summary = run(tmp_path / "run", **SMALL, **change)
    assert summary["metrics"]["held_out_accuracy"] == 0.5
    assert margin(summary) == 0
    assert summary["metrics"]["sample_reward"] == summary["baseline"]["sample_reward"]
    assert summary["metrics"]["sample_kl"] == 0
    assert not summary["passed"]


VARIANTS = [
    # By default one of each kind: of a margin, of both answers, of a batch, without a reference, of single judgments.
    pytest.param(
        {"loss": name} | ({"smoothing": 0.1} if name in ("exo", "robust") else {}),
        marks=[] if name in ("ipo", "apo_zero", "aot", "simpo", "kto") else pytest.mark.long,
    )
    # discopop's formula rises where training starts, so that it turns some margins round.
    for name in (*sorted(set(losses.LOSSES) - {"sigmoid", "discopop"}), "kto")
] + [
    {"method": "full", "lr": 1e-4},
    {"reference": "live", "sync_every": 10},
    {"reference": "live", "method": "full", "lr": 1e-4, "sync_every": 5, "sync_mix": 0.5},
    {"weighted": True, "lr": 1e-3},
    {"length_alpha": 0.5},
    {"divergence": "js"},
    {"accumulate": 4, "checkpointing": True, "dropout": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("change", VARIANTS, ids=lambda change: "-".join(map(str, change.values())))
def test_every_variant_prefers_the_chosen_answers(tmp_path, change, written):
    found = run(tmp_path / "run", **{"steps": 40, "prompts": 160, "eval_prompts": 60, "samples": 8, "sample_every": 0,
                                     "sft_steps": 120, **change})  # fmt: skip
    assert found["metrics"]["held_out_accuracy"] >= 0.6


@pytest.fixture(scope="module")
def written():
    """The toy's reference is taught once for all variants."""
    patch, kept = pytest.MonkeyPatch(), {}
    teach = setup.learn_to_write

    def once(run, model, tokenizer, steps):
        if not kept:
            teach(run, model, tokenizer, steps)
            kept.update({name: p.detach().clone() for name, p in model.named_parameters()})
        model.load_state_dict(kept, strict=False)

    patch.setattr(setup, "learn_to_write", once)
    yield
    patch.undo()


# --- References


def small():
    torch.manual_seed(0)
    return Llama(LlamaConfig(60, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=64))


def some_pairs(count=4):
    g = torch.Generator().manual_seed(0)

    def answer(prompt, n):
        return data.Answer(prompt, torch.randint(60, (n,), generator=g).tolist(), "").document()

    prompts = [torch.randint(60, (3 + i,), generator=g).tolist() for i in range(count)]
    return [data.Pair(answer(p, 4 + i), answer(p, 7 - i)) for i, p in enumerate(prompts)]


def test_all_references_give_the_same_numbers():
    """Adapters switched off, a moving one that has not moved, a copy, and precomputed ones: 1e-6."""
    pairs, whole = some_pairs(), small()
    rows = dpo.collate(pairs)
    copied = Reference(whole)
    adapted = small()
    lora.apply_lora(adapted, 4, generator=torch.Generator().manual_seed(0))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    off, moving = Reference(adapted), reference.MovingReference(adapted, trained)
    once = torch.cat(batches.answer_logprobs(adapted, data.both(pairs)))
    for p in [*trained.values(), *whole.parameters()]:
        p.data += 0.1 * torch.randn_like(p)

    def said(by):
        with torch.no_grad(), by.standing() as standing:
            return rows.logprobs(standing)

    wanted = said(copied)
    assert (rows.logprobs(whole) - wanted).abs().max() > 0.1
    for found in (said(off), said(moving), once):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    moving.update(1.0)  # now it is the policy
    torch.testing.assert_close(said(moving), rows.logprobs(adapted).detach())


def test_the_same_answer_twice_says_nothing():
    """ln 2, and no gradient in any parameter."""
    model, pair = small(), some_pairs(1)[0]
    rows = dpo.collate([dataclasses.replace(pair, rejected=pair.chosen)])
    loss, _ = dpo.pair_losses(dpo.Config(), model, rows, rows.logprobs(model).detach() - 0.3)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.693147, rel=1e-5)
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-6


def test_prompts_are_read_once_and_the_numbers_are_those_of_whole_documents():
    """Answers of unequal lengths, one of a single token, with unlearned tokens between and behind the learned ones, and
    two that begin differently."""
    model = small()
    answers = [[1, 1, 0, 1, 0], [1], [0, 1, 1]]
    groups = [[Document([4, 5, 6, 7 + i, *range(20, 20 + len(m))], [0, 0, 0, 0, *m]) for i, m in enumerate(answers)]]
    groups += [[Document([9, 8, 7, 6], [0, 1, 1, 1]), Document([3, 8, 7], [0, 0, 1])]]
    flat = data.flat(groups)
    plain = collate(flat)
    wanted = logprobs.token_logprobs(model, plain)
    rows = batches.Rows(groups)
    torch.testing.assert_close(rows.logprobs(model), wanted, rtol=0, atol=1e-5)
    assert rows.lengths.tolist() == logprobs.lengths(plain).tolist() == [3, 1, 2, 3, 1]
    torch.testing.assert_close(rows.sums(wanted), logprobs.sequence_sums(wanted, plain))
    assert rows.tokens == 3 + 4 + 1 + 3 + 3 + 2  # the common beginning once, no token behind the last learned one
    torch.testing.assert_close(torch.cat(batches.answer_logprobs(model, groups)), wanted.detach(), rtol=0, atol=1e-5)


def test_checkpointing_gives_the_same_gradients():
    found = []
    for on in (False, True):
        model = small()
        model.gradient_checkpointing = on
        rows = dpo.collate(some_pairs())
        dpo.pair_losses(dpo.Config(), model, rows, torch.zeros(len(rows.targets)))[0].sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_mismatched_answers_follow_other_prompts():
    documents = [data.Answer([i, i], [10 + i], "").document() for i in range(3)]
    assert [list(d.ids) for d in judged.mismatched(documents)] == [[0, 0, 11], [1, 1, 12], [2, 2, 10]]


def test_sampled_tokens_are_learned_as_they_are():
    """Decoded and encoded again they may be cut elsewhere; and an answer that was cut has no end to learn."""
    document = data.Answer([5, 6], [7, 8, 9], "whatever").document()
    assert (document.ids, document.mask) == ([5, 6, 7, 8, 9], [0, 0, 1, 1, 1])


# --- What a run leaves behind


def test_run_folder(trained):
    folder = trained[0]
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["loss"]]
    assert len(rows) == 100
    assert float(rows[0]["loss"]) == pytest.approx(0.6931, abs=1e-3)
    for name in ("margin", "accuracy", "chosen_logprob", "rejected_logprob", "chosen_reward", "grad_norm", "lr"):
        assert all(row[name] for row in rows)
    tastes = [float(row["sample_reward"]) for row in rows if row["sample_reward"]]
    assert len(tastes) == 3
    assert (folder / "training_curves.png").stat().st_size > 20_000
    answers = json.loads((folder / "answers.json").read_text())
    assert len(answers) == 128
    assert set(answers[0]) == {"prompt", "before", "during", "after"}
    assert sum(row["before"] != row["after"] for row in answers) > 64
    model = load.llama(folder / "model")
    assert model.config.vocab_size == load.tokenizer(folder / "model").vocab_size


def test_memory_is_predicted(trained):
    rows = {row["name"]: row for row in trained[1]["memory"]}
    for name in ("weights", "gradients", "optimizer states"):
        assert rows[name]["predicted"] == rows[name]["measured"] > 0
    assert rows["activations"]["predicted"] == pytest.approx(rows["activations"]["measured"], rel=0.05)


def test_same_seed_same_bytes(tmp_path):
    for name in ("first", "again"):
        run(tmp_path / name, steps=6, **SMALL | {"sample_every": 3})
    for name in ("metrics.csv", "answers.json", "pairs.json", "model/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


def test_a_stopped_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    """Stopped after 4 of 8 steps, with a reference that moves, and resumed."""
    given = {**SMALL, "steps": 8, "reference": "live", "sync_every": 3, "checkpoint_every": 2}
    run(tmp_path / "whole", **given)
    real, steps = dpo.optim.cosine, []

    def stop(step, *rest):
        steps.append(step)
        if step == 5 and rest[0] == 8:
            raise KeyboardInterrupt
        return real(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(dpo.optim, "cosine", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", **given)
    config = dataclasses.replace(dpo.Config.toy(), threads=1, **given)
    execute(registry.find("dpo"), config, tmp_path / "stopped", toy=True, resume=True)
    whole, found = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], found[name]) for name in whole)


# --- A user's rows


def rows_file(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_users_pairs_are_learned(tmp_path):
    """Chat pairs: the chosen answer says yes, whatever is asked."""
    texts = toy_openings()
    rows = [{"prompt": text, "chosen": "yes sunny", "rejected": "no rainy"} for text in texts[:80]]
    found = run(tmp_path / "run", data=rows_file(tmp_path, rows), steps=20, lr=1e-3, samples=2, sample_every=0,
                sft_steps=40, max_length=64)  # fmt: skip
    assert found["metrics"]["held_out_accuracy"] == 1
    assert "sample_reward" not in found["metrics"]


def test_the_adapter_answers_through_generate_and_serve(tmp_path):
    """Trained on a folder's chat model, it is found by the run's folder, together with its base."""
    tokenizer = trained_tokenizer()
    save.model(llama(vocab_size=tokenizer.vocab_size), tmp_path / "base", tokenizer)
    rows = [
        {"prompt": "the " * (i % 9 + 1), "chosen": "lazy dog", "rejected": "quick fox" + " x" * (i // 9)}
        for i in range(45)
    ]
    found = run(tmp_path / "run", model=str(tmp_path / "base"), data=rows_file(tmp_path, rows), steps=40, lr=1e-2,
                sft_weight=1.0, samples=2, sample_every=0, max_length=128)  # fmt: skip
    assert found["metrics"]["held_out_accuracy"] == 1
    before, after = (chat.answer(str(tmp_path / name), ["the the"], max_new_tokens=12) for name in ("base", "run"))
    assert after == ["lazy dog"] != before
    worker, tokenizer, name, stops = started(str(tmp_path / "run"), cache_tokens=256, console=Console(quiet=True))
    with listening(Server(worker, tokenizer, name, stops)) as base:
        body = {"model": name, "messages": [{"role": "user", "content": "the the"}], "temperature": 0}
        said = httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60).json()
    assert said["choices"][0]["message"]["content"] == "lazy dog"
    assert said["choices"][0]["finish_reason"] == "stop"


def test_single_judgments_are_learned_by_kto(tmp_path):
    texts = toy_openings()
    rows = [{"prompt": t, "completion": ("yes sunny", "no rainy")[i % 2], "label": i % 2 == 0} for i, t in
            enumerate(texts[:80])]  # fmt: skip
    found = run(tmp_path / "run", data=rows_file(tmp_path, rows), loss="kto", steps=20, lr=1e-3, samples=2,
                sample_every=0, sft_steps=40, max_length=64)  # fmt: skip
    assert found["metrics"]["held_out_accuracy"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 17}, "--accumulate 17 exceeds the batch of 16 pairs"),
        ({"loss": "aot", "accumulate": 2}, "--loss aot looks at the whole batch at once"),
        ({"loss": "kto", "sft_weight": 1.0}, "--sft-weight and --length-alpha are for pairs"),
        ({"loss": "exo"}, "--loss exo compares with smoothed labels"),
        ({"loss": "ipo", "smoothing": 0.1}, "--smoothing changes nothing in --loss ipo"),
        ({"loss": "nca", "divergence": "js"}, "its constant would not cancel"),
        ({"sync_every": 5}, "give --reference live too"),
        ({"sync_every": 5, "reference": "live", "sync_mix": 0.5}, "a mix of two adapters is no adapter"),
        ({"reward": "vadr"}, "there is no reward 'vadr'"),
        ({"gap": 99.0}, "none differs by --gap 99"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **{"steps": 1, **SMALL, **change})


def test_wrong_rows_are_refused_by_line(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": rejected} for rejected in "cb"]
    path = rows_file(tmp_path, rows)
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: 'chosen' and 'rejected' are the same"):
        run(tmp_path / "run", data=path, sft_steps=1)
