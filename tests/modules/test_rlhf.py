"""The module rlhf: that each stage learns and starts from the one before, controls, bad input, what a run leaves."""

import csv
import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.alignment import openings, rewards, samples
from finetune.alignment.preferences import document
from finetune.alignment.reward_model import RewardModel
from finetune.data.packing import Document
from finetune.errors import UserError
from finetune.lm.io import load
from finetune.lm.llama import Llama, LlamaConfig
from finetune.peft import adapters, lora
from finetune.runs import checkpoint, registry
from finetune.runs.metrics import MAIN
from finetune.runs.run import execute

rlhf = registry.load(registry.find("rlhf"))
data, policy, reward, stages = (registry.part("rlhf", name) for name in ("data", "policy", "reward", "stages"))


def run(folder, resume=False, **changes):
    config = dataclasses.replace(rlhf.Config.toy(), threads=1, **changes)
    return execute(registry.find("rlhf"), config, folder, toy=True, resume=resume)


SMALL = {"prompts": 60, "answers": 2, "eval_prompts": 10, "eval_answers": 4, "sft_steps": 30, "reward_steps": 10,
         "samples": 8, "beyond": 0, "batch": 16}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlhf") / "run"
    return folder, run(folder)


def test_toy_reaches_its_targets(trained):
    metrics, base = trained[1]["metrics"], trained[1]["baseline"]
    assert trained[1]["passed"]
    assert metrics["reward_accuracy"] >= 0.8 > base["reward_accuracy"]
    assert metrics["gold_reward"] >= base["gold_reward"] + 1.5
    assert metrics["policy_kl"] <= 10
    checks = {name: row["value"] for name, row in trained[1]["checks"].items()}
    assert checks["base_finished"] < 0.5 < 0.9 < checks["sft_finished"]


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_reach_them_too(tmp_path, seed):
    assert run(tmp_path / "run", seed=seed)["passed"]


@pytest.mark.parametrize("kind", ["rloo", pytest.param("grpo", marks=pytest.mark.long), "best_of_n"])
def test_other_ways_learn_from_the_same_reward_model(tmp_path, trained, kind):
    """Stages 1 and 2 are those of the run before."""
    found = run(tmp_path / "run", start=trained[0], policy=kind, steps=40, beyond=0)
    assert found["metrics"]["gold_reward"] >= found["baseline"]["gold_reward"] + 0.8
    assert found["metrics"]["reward_accuracy"] == trained[1]["metrics"]["reward_accuracy"]
    assert not (tmp_path / "run" / "reward").exists()
    assert "sft: loss" not in (tmp_path / "run" / "metrics.csv").read_text()


# --- Controls


@pytest.mark.parametrize("kind", ["ppo", "rloo", "grpo"])
def test_a_constant_reward_model_leaves_the_policy_at_the_reference(tmp_path, trained, kind):
    """Not by a bit."""
    found = run(tmp_path / "run", start=trained[0], reward="constant", policy=kind, steps=4, samples=16, beyond=0,
                unfinished=0.0)  # fmt: skip
    assert found["metrics"]["policy_kl"] == 0
    assert found["metrics"]["gold_reward"] == found["baseline"]["gold_reward"]
    assert not found["passed"]


@pytest.mark.long
def test_labels_that_are_turned_round_turn_the_policy_round(tmp_path):
    found = run(tmp_path / "run", flipped=1.0, samples=64, beyond=0)
    assert found["metrics"]["reward_accuracy"] < 0.25
    assert found["metrics"]["gold_reward"] < found["baseline"]["gold_reward"] - 1
    assert found["metrics"]["proxy_reward"] > found["baseline"]["proxy_reward"] + 0.5
    assert not found["passed"]


def test_destroyed_labels_teach_nothing(tmp_path):
    found = run(tmp_path / "run", flipped=0.5, samples=64, steps=20, beyond=0)
    assert abs(found["metrics"]["reward_accuracy"] - 0.5) < 0.25
    assert not found["passed"]


def test_a_negated_lexicon_file_turns_the_policy_round(tmp_path):
    """A user's reward that reads a user's lexicon: now the sad words are the good ones."""
    lexicon = [f"{word}\t{sign}" for words, sign in ((openings.GOOD, -1.0), (openings.BAD, 1.0)) for word in words]
    (tmp_path / "negated.txt").write_text("\n".join(lexicon))
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "LEXICON = dict(l.split('\\t') for l in Path(__file__).with_name('negated.txt').read_text().splitlines())\n"
        "def mine(prompts, completions, **columns):\n"
        "    return [sum(float(LEXICON.get(w, 0)) for w in text.split()) for text in completions]\n"
    )
    found = run(tmp_path / "run", gold=f"{tmp_path / 'mine.py'}:mine", samples=64, steps=40, beyond=0)
    assert found["metrics"]["gold_reward"] > found["baseline"]["gold_reward"] + 1
    answers = [row["policy"] for row in json.loads((tmp_path / "run" / "answers.json").read_text())]
    assert sum(openings.toy_score(answers, answers)) < -48


def test_without_training_there_is_no_gain(tmp_path, trained):
    found = run(tmp_path / "run", start=trained[0], steps=2, lr=0.0, samples=16, beyond=0)
    assert found["metrics"]["policy_kl"] == 0
    assert not found["passed"]


@pytest.mark.long
def test_the_gold_reward_without_a_clip(tmp_path, trained):
    """Nothing holds the policy: it goes far and repeats itself."""
    found = run(tmp_path / "run", start=trained[0], reward="gold", reward_clip=0.0, beta=0.0, lr=5e-3, beyond=0)
    assert found["metrics"]["gold_reward"] > trained[1]["metrics"]["gold_reward"]
    assert found["metrics"]["policy_kl"] > 2 * trained[1]["metrics"]["policy_kl"]
    assert found["metrics"]["distinct_2"] < 0.7 * found["baseline"]["distinct_2"]


# --- The parts


def small(seed=0):
    torch.manual_seed(seed)
    return Llama(LlamaConfig(60, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=64))


def test_scores_are_clipped_and_charged():
    cfg = dataclasses.replace(rlhf.Config.toy(), reward_clip=2.0, length_penalty=0.1, unfinished=0.5)
    rewards, lengths = torch.tensor([-9.0, 1.0, 60.0]), torch.tensor([1, 2, 3])
    found = policy.score(cfg, rewards, lengths, torch.tensor([True, False, True]))
    torch.testing.assert_close(found, torch.tensor([-2.1, 0.3, 1.7]))
    free = dataclasses.replace(cfg, reward_clip=0.0, length_penalty=0.0, unfinished=0.0)
    assert torch.equal(policy.score(free, rewards, lengths, torch.tensor([True, False, True])), rewards)


def documents(count=6):
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(60, (5 + 3 * i,), generator=g).tolist() for i in range(count)]
    return [Document(x, [0] * 3 + [1] * (len(x) - 3)) for x in ids]


def test_a_reward_depends_on_its_answer_alone():
    """Neighbors take the place of padding here: not on them, not on how many there are, not on their order."""
    model = small()
    judge = RewardModel(model, "mean", 1, torch.Generator().manual_seed(0))
    together = reward.scores(judge, documents())
    alone = torch.cat([reward.scores(judge, [d]) for d in documents()])
    turned = reward.scores(judge, documents()[::-1]).flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together, turned, rtol=1e-5, atol=1e-6)


def test_the_heads_of_an_ensemble_have_losses_of_their_own():
    cfg = dataclasses.replace(rlhf.Config.toy(), heads=3, margin=0.5, centering=0.1)
    judge = RewardModel(small(), "mean", 3, torch.Generator().manual_seed(0))
    pairs = [data.Pair(a, b, 2.0) for a, b in itertools.pairwise(documents())]
    loss, margins = reward.loss_of(cfg, judge, pairs)
    each = []
    for i in range(3):
        one = RewardModel(judge.model, "mean", 1)
        one.head.weight.data.copy_(judge.head.weight[i : i + 1])
        each.append(reward.loss_of(cfg, one, pairs)[0])
    torch.testing.assert_close(loss, torch.stack(each).mean())
    assert margins.shape == (5,)


def test_the_models_share_their_weights_and_each_has_an_adapter(tmp_path):
    """A new adapter begins as the one it comes from; putting one on puts the others off; training the policy changes
    neither the reference nor the reward model."""
    cfg, model = rlhf.Config.toy(), small()
    batch = torch.arange(12)[None]
    g = torch.Generator().manual_seed(0)

    class Runs:
        def generator(self, *key):
            return torch.Generator().manual_seed(len(key))

    base = model(batch).detach()
    stages.new_adapter(cfg, Runs(), model, "sft", like="")
    for p in stages.parameters(model, "sft").values():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    tuned = model(batch).detach()
    assert (tuned - base).abs().max() > 1e-3
    stages.new_adapter(cfg, Runs(), model, "policy", like="sft")
    assert torch.equal(model(batch), tuned)
    before = checkpoint.fingerprint(stages.frozen(model))
    trained = stages.parameters(model, "policy")
    assert all(".parts.policy." in name for name in trained)
    for p in trained.values():
        p.data += 0.05
    assert checkpoint.fingerprint(stages.frozen(model)) == before
    assert not torch.equal(model(batch), tuned)
    stages.wear(model, "sft")
    assert torch.equal(model(batch), tuned)
    stages.wear(model, "none of them")
    assert torch.equal(model(batch), base)
    next(p for name, p in model.named_parameters() if ".parts.sft." in name).data.add_(1e-3)
    assert checkpoint.fingerprint(stages.frozen(model)) != before


def answer(text, ended=True, prompt="The dog was"):
    return data.Answer(data.Prompt(prompt, [1, 2]), [3, 4], text, ended)


def test_demonstrations_are_whole_sentences():
    class Words:
        eos_id = 9

        def encode(self, text, add_special_tokens=True):
            return [len(word) for word in text.split()]

    texts = [" a friend. And then", " never heard of.", " here\n\nThe cat.", " 3.5 years old! Yes", " ..."]
    found = data.demonstrate([answer(t) for t in texts], Words())
    assert [list(d.ids) for d in found] == [[3, 3, 3, 1, 7, 9], [3, 3, 3, 5, 5, 3, 9]]
    with pytest.raises(UserError, match="of 1 answers none has a whole sentence"):
        data.demonstrate([answer(" and so on")], Words())


def test_pairs_are_neighbors_that_differ():
    def score(prompts, texts):
        return [float(len(text)) for text in texts]

    groups = [[answer("aaa"), answer("b"), answer("cc"), answer("dd")], [answer("e"), answer("fff"), answer("g")]]
    found = data.pairs_of(groups, score, 0.0)
    assert [pair.gap for pair in found] == [2.0, 2.0]
    assert not data.pairs_of(groups, score, 2.5)


def test_distinct_bigrams():
    assert samples.distinct(["love love love"]) == 0.5
    assert samples.distinct(["a b c", "a b d"]) == 0.75
    assert samples.distinct(["a", ""]) == 1.0


def test_best_of_n_by_its_definition(monkeypatch):
    """The mean over all sets of n of the N answers of what the best by the proxy has."""
    g = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(3, 6, generator=g), torch.randn(3, 6, generator=g)
    groups = [[answer(f"{i} {j}") for j in range(6)] for i in range(3)]
    monkeypatch.setattr(reward, "scores", lambda judge, found, caution: proxy.flatten())

    def score(prompts, texts):
        return [gold[tuple(map(int, text.split()))].item() for text in texts]

    rows = rlhf.best_of(rlhf.Config.toy(), groups, None, score, rewards.Scale(), rewards.Scale())
    for n, (distance, of_proxy, of_gold) in enumerate(rows, 1):
        assert distance == rlhf.best_of_n_kl(n)
        sets = [list(x) for x in itertools.combinations(range(6), n)]
        best = [[some[proxy[i, some].argmax()] for some in sets] for i in range(3)]
        for values, found in ((proxy, of_proxy), (gold, of_gold)):
            wanted = torch.stack([values[i, best[i]].mean() for i in range(3)]).mean().item()
            assert found == pytest.approx(wanted, abs=1e-5)


# --- What a run leaves behind


def test_run_folder(trained):
    folder = trained[0]
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    main = [row for row in rows if not row["phase"]]
    assert len(main) == 60
    for name in ("proxy", "gold", "score", "kl", "length", "value_loss", "explained_variance", "clip_fraction", "beta"):
        assert all(row[name] for row in main)
    assert float(main[0]["kl"]) == 0, "the policy begins as the reference, and its ratio is 1"
    assert float(main[0]["clip_fraction"]) == float(main[0]["approximate_kl"]) == 0
    for name in ("overoptimization", "reward_model", "training_curves"):
        assert (folder / f"{name}.png").stat().st_size > 20_000
    answers = json.loads((folder / "answers.json").read_text())
    assert len(answers) == 128
    assert set(answers[0]) == {"prompt", "base", "sft", "during", "policy"}
    assert sum(row["sft"] != row["policy"] for row in answers) > 64
    assert trained[1]["checks"]["reference_and_reward_model_unchanged"]["value"] == 1
    assert len(json.loads((folder / "beyond.json").read_text())) == 128


def test_every_stage_is_a_model_that_loads(trained):
    """sft/ whole, reward/ an adapter on it with its head, model/ whole."""
    sft, tokenizer = load.llama(trained[0] / "sft"), load.tokenizer(trained[0] / "sft")
    after = load.llama(trained[0] / "model")
    tokens = torch.tensor([tokenizer.encode("now the movie is sunny")])
    assert (sft(tokens) - after(tokens)).abs().max() > 0.1
    adapters.load_adapter(sft, trained[0] / "reward", "reward")
    judge = RewardModel(sft)
    judge.load(trained[0] / "reward")
    words = (" sunny kind happy warm brave", " rainy cruel sad cold dark")
    good, bad = reward.scores(judge, [document(tokenizer, "now the movie is", text) for text in words]).tolist()
    assert good > bad + 1


@pytest.mark.long
def test_same_seed_same_bytes(tmp_path):
    for name in ("first", "again"):
        run(tmp_path / name, steps=4, **SMALL | {"beyond": 2})
    for name in ("metrics.csv", "answers.json", "pairs.json", "model/model.safetensors", "beyond.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


@pytest.mark.parametrize(
    "stage",
    [MAIN, *(pytest.param(name, marks=pytest.mark.long) for name in ("sft", "reward", "beyond"))],
)
def test_a_stopped_run_continues_to_the_same_bits(tmp_path, monkeypatch, stage):
    given = {**SMALL, "steps": 4, "beyond": 4, "checkpoint_every": 2, "kl_target": 1.0, "passes": 2}
    run(tmp_path / "whole", **given)
    real = rlhf.Run.log

    def stop(self, step, **metrics):
        real(self, step, **metrics)
        if self.phase == stage and step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rlhf.Run, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", **given)
    run(tmp_path / "stopped", resume=True, **given)
    for name in ("model/model.safetensors", "reward/adapter_model.safetensors", "sft/model.safetensors"):
        whole, found = (load_file(tmp_path / folder / name) for folder in ("whole", "stopped"))
        assert all(torch.equal(whole[key], found[key]) for key in whole)
    for name in ("answers.json", "beyond.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "stopped" / name).read_text()


# --- A user's rows, and what cannot be


def test_a_users_pairs_are_learned(tmp_path):
    """Chat pairs: people prefer yes, whatever is asked. There is no gold reward."""
    rows = [{"prompt": t, "chosen": "yes sunny", "rejected": "no rainy"} for t in openings.toy_openings()[:80]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(tmp_path / "run", data=path, sft_steps=60, reward_steps=20, steps=6, max_length=64, **{
        k: SMALL[k] for k in ("samples", "beyond", "batch")
    })  # fmt: skip
    assert found["metrics"]["reward_accuracy"] == 1
    assert "gold_reward" not in found["metrics"]
    assert "proxy_reward" in found["metrics"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": "q,head"}, "the head is shared by all stages"),
        ({"batch": 30}, "--batch 30 must be a multiple of --group 4"),
        ({"policy": "rloo", "group": 1}, "--policy rloo compares answers to the same prompt"),
        ({"policy": "best_of_n", "passes": 2}, "--policy best_of_n imitates answers once"),
        ({"caution": 1.0}, "--caution needs heads that can differ"),
        ({"gold": "vadr"}, "there is no reward 'vadr'"),
        ({"gap": 99.0}, "none differs by --gap 99"),
        ({"prompts": 300}, "there are 200 openings"),
        ({"start": "empty"}, r"--start .*empty: a run of rlhf has a folder sft/"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, change, message):
    if "start" in change:
        change = {"start": tmp_path / "empty"}
        change["start"].mkdir()
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **{"steps": 1, **SMALL, **change})


def test_a_reward_model_of_another_size_is_refused(tmp_path, trained):
    shutil.copytree(trained[0], tmp_path / "copy")
    judge = RewardModel(small())
    judge.save(tmp_path / "copy" / "reward")
    with pytest.raises(UserError, match=r"reward.safetensors is not the head of a reward model of 64 numbers"):
        run(tmp_path / "run", start=tmp_path / "copy", steps=1)
    assert "sft" not in lora.names(judge.model)
