"""The module grpo: that it learns, what it must not learn from, gradients of parts, bad input, what a run leaves."""

import csv
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from finetune import cli
from finetune.alignment import rollouts, shared_prompts
from finetune.alignment.kl import FixedCoefficient
from finetune.alignment.logprobs import Reference
from finetune.alignment.rollouts import Rollout
from finetune.errors import UserError
from finetune.lm.io import load
from finetune.lm.llama import Llama, LlamaConfig
from finetune.peft import lora
from finetune.runs import registry
from finetune.runs.run import Run, execute

grpo = registry.load(registry.find("grpo"))
tasks = registry.part("grpo", "tasks")
SMALL = {"sft_steps": 30, "prompts": 4, "samples": 4, "eval_every": 0, "refills": 1}


def run(folder, **changes):
    config = dataclasses.replace(grpo.Config.toy(), threads=1, **changes)
    return execute(registry.find("grpo"), config, folder, toy=True)


def rows(folder):
    return [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["reward"]]


def own_reward(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(f"import random\n\ndef mine(prompts, completions, **columns):\n    return {body}\n")
    return (f"{path}:mine",)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than some runs."""
    monkeypatch.setattr(Run, "curves", lambda self: None)
    monkeypatch.setattr(grpo, "measure_memory", lambda *_: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo") / "run"
    return folder, run(folder)


def test_toy_reaches_its_target(trained):
    summary = trained[1]
    assert summary["passed"]
    assert summary["baseline"]["sampled_accuracy"] <= 0.25
    assert summary["metrics"]["sampled_accuracy"] >= 0.9


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_reach_it_too(tmp_path, seed):
    assert run(tmp_path / "run", seed=seed)["passed"]


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 3, "lr": 0.0}])
def test_without_training_there_is_no_gain(tmp_path, change):
    summary = run(tmp_path / "run", **SMALL | change)
    assert summary["metrics"]["sampled_accuracy"] == summary["baseline"]["sampled_accuracy"]
    assert summary["metrics"]["sample_kl"] == pytest.approx(0, abs=1e-6)
    assert not summary["passed"]


def test_a_constant_reward_moves_no_bit(tmp_path):
    """Also without dynamic sampling, where the groups are kept."""
    reward = own_reward(tmp_path, "[0.7] * len(completions)")
    ends = []
    for name, change in {"none": {"steps": 0}, "dynamic": {}, "kept": {"dynamic": False}}.items():
        run(tmp_path / name, reward=reward, **SMALL | {"steps": 2} | change)
        ends.append(load_file(tmp_path / name / "model/model.safetensors"))
    for other in ends[1:]:
        assert all(torch.equal(ends[0][key], other[key]) for key in other)


@pytest.mark.long
def test_a_random_reward_teaches_nothing(tmp_path):
    reward = own_reward(tmp_path, "[random.random() for _ in completions]")
    found = run(tmp_path / "run", reward=reward, steps=30, eval_every=0)
    assert abs(found["metrics"]["sampled_reward"] - 0.5) < 0.15


def test_a_users_reward_file_is_learned(tmp_path):
    """1 if the digit count is even, by the command line, of a model that was taught five digits and errs at times."""
    (tmp_path / "my_reward.py").write_text(
        "def even(prompts, completions, **columns):\n"
        "    return [float(sum(c.isdigit() for c in text) % 2 == 0) for text in completions]\n"
    )
    words = ["run", "grpo", "--toy", "--reward", f"{tmp_path}/my_reward.py:even", "--out", str(tmp_path / "run")]
    settings = {"threads": 1, "steps": 30, "sft-steps": 80, "eval-every": 0}
    assert cli.main([*words, *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]) in (0, 1)
    found = json.loads((tmp_path / "run/summary.json").read_text())
    assert found["baseline"]["sampled_reward"] < 0.6
    assert found["metrics"]["sampled_reward"] > 0.9


VARIANTS = [
    pytest.param({"loss": name}, marks=[] if name in ("dapo", "gspo") else pytest.mark.long)
    for name in ("bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "luspo", "vespo")
] + [
    pytest.param(change, marks=pytest.mark.long)
    for change in (
        {"advantage": "group_centered"}, {"advantage": "batch"}, {"advantage": "leave_one_out"},
        {"kl_weight": 0.01}, {"kl_weight": 0.01, "kl_in": "reward", "kl_target": 1.0},
        {"kl_weight": 0.01, "kl_kind": "k2"},
        {"dual_clip": 3.0, "epochs": 2}, {"two_sided": 4.0, "updates": 2}, {"overlong": "masked"},
        {"overlong": "penalty"}, {"entropy": 0.01}, {"entropy_share": 0.5, "accumulate": 2}, {"sampler": "bf16"},
        {"sampler": "int8"}, {"sampler": "modules"}, {"dynamic": False}, {"method": "lora", "lr": 1e-2, "dropout": 0.1},
    )
]  # fmt: skip


@pytest.mark.parametrize("change", VARIANTS, ids=lambda change: "-".join(map(str, change.values())))
def test_every_variant_learns(tmp_path, change):
    reward = own_reward(tmp_path, "[float(c.strip().startswith('1')) for c in completions]")
    given = {"steps": 12, "sft_steps": 60, "eval_every": 0, "prompts": 8, "refills": 0, "reward": reward}
    found = run(tmp_path / "run", **given | change)
    assert found["metrics"]["sampled_reward"] > found["baseline"]["sampled_reward"] + 0.1


def test_several_rewards_are_added_with_their_weights(tmp_path):
    given = (*own_reward(tmp_path, "[1.0] * len(completions)"), "length*0.5")
    run(tmp_path / "run", reward=given, steps=1, **SMALL)
    row = rows(tmp_path / "run")[0]
    named = [key for key in row if key.startswith("reward_")]
    assert len(named) == 2
    assert float(row["reward"]) == pytest.approx(1 + 0.5 * float(row["reward_length"]), rel=1e-5)


# --- The algorithm


def small():
    torch.manual_seed(0)
    return Llama(LlamaConfig(60, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=64))


def judged(spread=True):
    g = torch.Generator().manual_seed(0)
    found = []
    for i in range(4):
        answers = [torch.randint(60, (2 + (i + j) % 4,), generator=g).tolist() for j in range(3)]
        rewards = torch.tensor([0.0, 1.0, float(i == 2)]) if spread else torch.full((3,), 0.4)
        sampled = [-torch.rand(len(a), generator=g) for a in answers]
        group = Rollout(
            torch.randint(60, (3 + i,), generator=g).tolist(), answers, sampled, [True, i > 0, True], [""] * 3
        )
        found.append(grpo.Judged(group, rewards))
    return found


class Kept:
    """An optimizer that keeps the gradients instead of making a step."""

    def __init__(self, parameters):
        self.parameters, self.grads = list(parameters), []

    def step(self, lr):
        self.grads.append([p.grad.clone() for p in self.parameters])

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def updated(model, spread=True, **changes):
    config = dataclasses.replace(grpo.Config.toy(), prompts=4, samples=3, clip=1e9, **changes)
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = Kept(trained)
    coefficient = FixedCoefficient(config.kl_weight)
    found = grpo.update(config, model, kept, trained, Reference(model), judged(spread), coefficient, 0.0)
    return found, kept.grads


SPLIT = [
    {"loss": name} for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "luspo", "vespo")
] + [
    {"overlong": "masked"}, {"kl_weight": 0.1}, {"kl_weight": 0.1, "kl_in": "reward"}, {"entropy": 0.1},
    {"entropy_share": 0.4}, {"advantage": "batch"},
]  # fmt: skip


@pytest.mark.parametrize("change", SPLIT, ids=lambda change: "-".join(map(str, change.values())))
def test_parts_of_an_update_add_up(change):
    """One mask for numerator, denominator, KL and metrics: micro-batches give the gradient of the whole batch."""
    model = small()
    (whole, [grads]), (parts, [summed]) = updated(model, **change), updated(model, accumulate=3, **change)
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert parts["entropy"] == pytest.approx(whole["entropy"], rel=1e-5)
    for a, b in zip(summed, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_updates_of_equal_parts_average_to_the_whole(name):
    """Several optimizer steps on one batch of answers, before the policy changes: also with micro-batches in each."""
    model = small()
    _, [whole] = updated(model, loss=name)
    for accumulate in (1, 2):
        _, grads = updated(model, loss=name, updates=2, accumulate=accumulate)
        for a, b, wanted in zip(*grads, whole, strict=True):
            torch.testing.assert_close((a + b) / 2, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [{}, {"temperature": 0.7}, {"epochs": 2}, {"updates": 2}])
def test_the_first_ratio_is_exactly_one(change):
    """With LoRA and dropout, at another temperature; nothing is clipped."""
    model = small()
    lora.apply_lora(model, 4, dropout=0.3, generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    seen = []
    real = grpo.policy_loss.policy_loss

    def watch(answers, totals, s):
        seen.append(torch.equal(answers.logprobs.detach(), answers.old))
        return real(answers, totals, s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.policy_loss, "policy_loss", watch)
        found, _ = updated(model.train(), **change)
    assert seen[0]
    assert len(seen) == change.get("epochs", 1) * change.get("updates", 1)
    if not change.get("epochs") and not change.get("updates"):
        assert found["ratio"] == 1
        assert found["clipped"] == found["approximate_kl"] == 0


def test_groups_of_one_reward_have_no_gradient_and_no_step():
    """Identical samples have one reward too."""
    model = small()
    for change in ({}, {"loss": "dapo"}, {"advantage": "batch"}):
        found, grads = updated(model, spread=False, **change)
        assert grads == []
        assert found == {}


def test_masked_answers_have_no_gradient():
    """Answers that were cut off, with --overlong masked: only the answers that ended are computed."""
    layouts = []
    real = shared_prompts.token_logprobs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shared_prompts, "token_logprobs", lambda m, layout, t: layouts.append(layout) or real(m, layout, t)
        )
        updated(small(), overlong="masked", kl_weight=0.1)
    cut = judged()[0].rollout.answers[1]
    ended = [a for one in judged() for a, yes in zip(one.rollout.answers, one.rollout.finished, strict=True) if yes]
    assert len(layouts[-1].targets) == sum(map(len, ended))
    assert cut not in [layouts[-1].targets[layouts[-1].owners == i].tolist() for i in range(len(ended))]


def test_only_answers_have_a_gradient():
    """No loss at a prompt's token, and none behind the end: the last token of an answer predicts nothing."""
    model, states = small(), []
    real = grpo.shared_prompts.logprobs.of_states

    def watch(m, hidden, targets, temperature):
        states.append((hidden, targets))
        return real(m, hidden, targets, temperature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.shared_prompts.logprobs, "of_states", watch)
        updated(model)
    answers = [a for one in judged() for a in one.rollout.answers]
    assert len(states[0][1]) <= sum(map(len, answers))
    assert set(states[0][1].tolist()) <= {token for a in answers for token in a}


def test_a_sampler_that_differs_is_corrected():
    """Samples of another policy than the trained one: weighted by π / π_sampler their gradient is nearer to that of the
    policy's own samples, for the group's mean over many answers."""
    model, other = small(), small()
    for p in other.parameters():
        p.data += 0.15 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    tokenizer = tasks.parity_tokenizer()

    def gradient(sampler, correct):
        groups = rollouts.rollouts(rollouts.Sampler(sampler), tokenizer, [[5, 9, 3]], 4000, 1,
                                   generator=torch.Generator().manual_seed(1))  # fmt: skip
        rewards = torch.tensor([float(a[0] < 20) for a in groups[0].answers])
        kept = Kept(model.parameters())
        config = dataclasses.replace(grpo.Config.toy(), prompts=1, samples=4000, clip=1e9, correct_sampler=correct,
                                     advantage="group_centered", sampler_cap=10.0)  # fmt: skip
        grpo.update(config, model, kept, kept.parameters, Reference(model), [grpo.Judged(groups[0], rewards)],
                    FixedCoefficient(0.0), 0.0)  # fmt: skip
        return torch.cat([g.flatten() for g in kept.grads[0]])

    right, plain, corrected = gradient(model, False), gradient(other, False), gradient(other, True)
    assert (corrected - right).norm() < 0.7 * (plain - right).norm()


# --- What a run leaves behind


def test_run_folder(trained):
    folder = trained[0]
    found = rows(folder)
    assert len(found) == 140
    for name in ("no_spread", "sampled_groups", "answer_tokens", "truncated", "trained_groups", "lr"):
        assert all(row[name] for row in found), name
    learned = [row for row in found if row["loss"]]
    assert len(learned) > 40
    assert all(float(row["ratio"]) == 1 for row in learned)
    assert max(float(row["sampler_gap"]) for row in learned) < 1e-3  # fp32: rounding
    assert all(float(row["trained_groups"]) <= 16 for row in found)
    assert (folder / "training_curves.png").stat().st_size > 20_000
    answers = json.loads((folder / "answers.json").read_text())
    assert set(answers[0]) == {"prompt", "before", "during", "after", "reward"}
    model = load.llama(folder / "model")
    assert model.config.vocab_size == load.tokenizer(folder / "model").vocab_size


def test_memory_is_predicted(trained):
    found = {row["name"]: row for row in trained[1]["memory"]}
    for name in ("weights", "gradients", "optimizer states"):
        assert found[name]["predicted"] == found[name]["measured"] > 0
    assert found["activations"]["predicted"] == pytest.approx(found["activations"]["measured"], rel=0.25)


def test_a_stopped_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    given = {**SMALL, "steps": 6, "checkpoint_every": 2, "kl_weight": 0.01, "kl_target": 1.0}
    run(tmp_path / "whole", **given)
    real = grpo.collect

    def stop(cfg, now, *rest):
        if now.finished_steps == 3:
            raise KeyboardInterrupt
        return real(cfg, now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "collect", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", **given)
    config = dataclasses.replace(grpo.Config.toy(), threads=1, **given)
    execute(registry.find("grpo"), config, tmp_path / "stopped", toy=True, resume=True)
    whole, found = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "stopped/metrics.csv").read_bytes()


def test_a_users_prompts(tmp_path):
    """Rows of prompts with a column that the reward compares with."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": i % 2}) + "\n"
                            for i, text in enumerate(tasks.parity_prompts())))  # fmt: skip
    reward = own_reward(tmp_path, "[float(str(a) in c) for c, a in zip(completions, columns['answer'])]")
    found = run(tmp_path / "run", data=path, raw=True, reward=reward, steps=2, **SMALL)
    assert 0 < found["metrics"]["sampled_reward"] <= 1
    with pytest.raises(UserError, match="say what judges the answers with --reward"):
        run(tmp_path / "none", data=path, steps=1, **SMALL)


def test_sums_are_asked_once_and_never_shown():
    config = grpo.Config()
    texts = tasks.sum_prompts(config)
    asked = [text.splitlines()[-1] for text in texts]
    assert len(set(asked)) == len(asked) > 7000
    shown = texts[0].splitlines()[:-1]
    assert len(shown) == 3
    assert not {line.split("=")[0] + "=" for line in shown} & set(asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": 3, "accumulate": 2}, "are more than the 4 groups of a step"),
        ({"dual_clip": 0.5}, "--dual-clip 0.5 must be above 1"),
        ({"two_sided": 1.1}, "--two-sided 1.1 must be above 1"),
        ({"loss": "cispo", "dual_clip": 3.0}, "are for losses that clip, not for cispo"),
        ({"loss": "sapo", "clip_high": 0.3}, "--loss sapo does not clip"),
        ({"loss": "cispo", "clip_low": 0.3}, "bounds ρ from above only"),
        ({"loss": "gspo", "ratio": "token"}, "has a ratio of the whole answer"),
        ({"loss": "vespo", "ratio": "token"}, "has a weight of the whole answer"),
        ({"kl_target": 1.0}, "give --kl-weight, which it starts from"),
        ({"kl_in": "reward"}, "--kl-in reward needs --kl-weight"),
        ({"overlong": "penalty", "overlong_margin": 9}, "--overlong-margin 9 exceeds --new-tokens 7"),
        ({"reward": ("sun",)}, "there is no reward 'sun'"),
        ({"reward": ("sum",)}, "the prompt does not end with a sum"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **SMALL | {"steps": 1, "sft_steps": 1} | change)
