"""The ppo module's language-model half: where an update begins, what stays fixed, controls, a user's own things."""

import dataclasses
import json

import pytest
import torch
from resumed import resumes_to_the_same_bytes

from finetune.alignment import rewards
from finetune.alignment.rollouts import Sampler
from finetune.alignment.toy_writer import toy_tokenizer
from finetune.data import packing
from finetune.data.toy_directory import small_config, small_llama
from finetune.errors import UserError
from finetune.lm.io import save
from finetune.peft import adapters, lora
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("ppo")
module, lm, ppo = registry.load(INFO), registry.part("ppo", "lm"), registry.part("ppo", "ppo")


def toy(**changes):
    return dataclasses.replace(module.Config.toy(), task="lm", **changes)


def run(folder, **changes):
    return execute(INFO, toy(**changes), folder, toy=True)


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


class Loop:
    """As much of a run as the reference of the toy needs."""

    cfg = toy()

    def steps(self, total, state, phase):
        return range(total)

    def log(self, step, **metrics):
        pass


@pytest.fixture(scope="module")
def written(tokenizer):
    """The reference of the runs is taught once."""
    torch.manual_seed(0)
    model = small_llama(small_config(tokenizer.vocab_size, lm.PROMPT_ROOM + 12))
    lm.learn_to_write(Loop(), model, tokenizer, toy().sft_steps)
    kept, patch = model.state_dict(), pytest.MonkeyPatch()
    patch.setattr(lm, "learn_to_write", lambda run, model, tokenizer, steps: model.load_state_dict(kept))
    yield
    patch.undo()


# --- The toy


@pytest.fixture(scope="module")
def trained(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("ppo") / "run"
    return execute(INFO, toy(), folder, toy=True), folder


def test_the_toy_reaches_its_targets(trained):
    found, _ = trained
    assert found["passed"]
    assert found["metrics"]["sample_reward"] >= found["baseline"]["sample_reward"] + 1.5
    assert 0.5 < found["metrics"]["sample_kl"] <= 10
    assert found["checks"]["first_log_ratio"]["value"] == found["checks"]["first_clipped"]["value"] == 0


@pytest.mark.long
@pytest.mark.parametrize("seed", [31, 32, 33])
def test_the_toy_reaches_its_targets_on_seeds_that_nothing_was_tuned_to(seed, tmp_path, no_pictures):
    assert run(tmp_path / "run", seed=seed)["passed"]


def test_answers_before_during_and_after_are_kept(trained):
    rows = json.loads((trained[1] / "answers.json").read_text())
    assert len(rows) == 128
    assert len({row["prompt"] for row in rows}) > 20
    assert all({"prompt", "before", "during", "after"} == set(row) for row in rows)
    assert sum(row["before"] != row["after"] for row in rows) > len(rows) / 2
    assert (trained[1] / "answers.png").stat().st_size > 10_000
    assert (trained[1] / "model/model.safetensors").exists()


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"shuffle": True, "kl_aim": 1.0}])
def test_without_a_rate_or_with_the_scores_of_others_nothing_is_learned(change, tmp_path, written, no_pictures):
    found = run(tmp_path / "run", **{"steps": 8} | change)
    assert abs(found["metrics"]["sample_reward"] - found["baseline"]["sample_reward"]) < 1
    assert not found["passed"]


def test_a_constant_reward_leaves_the_policy_near_the_reference(tmp_path, written, no_pictures):
    (tmp_path / "mine.py").write_text("def same(prompts, completions, **columns):\n    return [3.0] * len(prompts)\n")
    found = run(tmp_path / "run", steps=8, reward=(f"{tmp_path}/mine.py:same",))
    assert found["metrics"]["sample_kl"] < 0.5


def test_a_users_reward_and_prompts_are_learned(tmp_path, written, no_pictures):
    """The answer that a row asks for reaches the reward."""
    (tmp_path / "mine.py").write_text(
        "def has(prompts, completions, word, **columns):\n"
        "    return [float(text.count(one)) for text, one in zip(completions, word)]\n"
    )
    rows = [{"prompt": f"now the {thing} is", "word": "sunny"} for thing in ("movie", "hotel", "game", "city", "dog")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(tmp_path / "run", steps=15, data=tmp_path / "rows.jsonl", raw=True,
                reward=(f"{tmp_path}/mine.py:has",), kl_aim=8.0, beta=0.05)  # fmt: skip
    assert found["metrics"]["sample_reward"] > found["baseline"]["sample_reward"] + 0.5


def test_a_stopped_run_continues_to_the_same_bytes(tmp_path, written, no_pictures):
    small = {"steps": 3, "checkpoint_every": 1, "answers": 4, "samples": 4, "new_tokens": 12}
    resumes_to_the_same_bytes(INFO, toy(**small, critic="separate"), tmp_path, 2)


# --- An update


def models_of(tokenizer, **changes):
    cfg = toy(**{"answers": 8, "new_tokens": 8} | changes)
    torch.manual_seed(0)
    model = small_llama(small_config(tokenizer.vocab_size, 64)).to(getattr(torch, cfg.dtype))
    return cfg, lm.Models(cfg, model, torch.Generator().manual_seed(0))


def answers_of(cfg, models, tokenizer, seed=0):
    prompts = [lm.Prompt(text, tokenizer.encode(text)) for text in ("now the movie is", "still the dog")]
    prompts = (prompts * cfg.answers)[: cfg.answers]
    return lm.ask(cfg, Sampler(models.model, None), tokenizer, prompts, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("changes", "dropout"),
    [
        ({"critic": "shared"}, 0.0),
        ({"critic": "separate", "temperature": 0.6}, 0.0),
        ({"critic": "shared", "temperature": 1.7, "dtype": "bfloat16"}, 0.5),
        ({"critic": "separate", "minibatches": 3}, 0.5),
    ],
)
def test_the_first_ratios_of_every_update_are_exactly_one(tokenizer, changes, dropout):
    cfg, models = models_of(tokenizer, lr=0.05, **changes)
    for _, layer in lora.adapters(models.model):
        for part in layer.parts.values():
            part.dropout = dropout
    models.train()  # as a loop that forgot about dropout would leave it
    models.model.eval()
    learner, rng = lm.Learner(cfg, models), torch.Generator().manual_seed(0)
    for step in range(3):
        answers = answers_of(cfg, models, tokenizer, step)
        found = learner.update(answers, torch.randn(cfg.answers, generator=rng), 1.0, rng)
        assert found["first_ratio"] == found["first_clip_fraction"] == 0
        assert found["kl"] > 0


def bits(models, which):
    return [p.clone() for name, p in models.named_parameters() if which(name)]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_clip_of_zero_changes_nothing_but_the_critic(tokenizer):
    cfg, models = models_of(tokenizer, lr=0.05, clip=0.0, critic="separate")
    learner, rng = lm.Learner(cfg, models), torch.Generator().manual_seed(0)
    policy, value = bits(models, lambda n: ".policy." in n), bits(models, lambda n: ".value." in n)
    for step in range(2):
        learner.update(answers_of(cfg, models, tokenizer, step), torch.randn(8, generator=rng), 1.0, rng)
    assert same(policy, bits(models, lambda n: ".policy." in n))
    assert not same(value, bits(models, lambda n: ".value." in n))


def test_an_update_leaves_weights_and_reference_as_they_are(tokenizer):
    cfg, models = models_of(tokenizer, lr=0.05, critic="separate")
    answers = answers_of(cfg, models, tokenizer)
    batch = packing.collate([answer.document() for answer in answers])
    frozen, reference = bits(models, lambda n: ".parts." not in n and n != "head.weight"), models.logprobs(batch, "sft")
    policy = models.logprobs(batch)
    assert torch.equal(policy, reference)  # adapters begin at nothing
    learner, rng = lm.Learner(cfg, models), torch.Generator().manual_seed(0)
    learner.update(answers, torch.randn(8, generator=rng), 1.0, rng)
    assert same(frozen, bits(models, lambda n: ".parts." not in n and n != "head.weight"))
    assert torch.equal(models.logprobs(batch, "sft"), reference)
    assert not torch.allclose(models.logprobs(batch), policy, atol=1e-3)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_values_are_read_before_each_token(tokenizer, critic):
    """The value of a token does not depend on it nor on what follows; a separate critic does not move the policy."""
    cfg, models = models_of(tokenizer, critic=critic)
    models.head.weight.data.normal_()
    answer = answers_of(cfg, models, tokenizer)[0]
    ids = [*answer.ids[:3], *([7] * 4)]
    one, other = (
        models.outputs(packing.collate([dataclasses.replace(answer, ids=tokens).document()]))
        for tokens in (ids, [*ids[:2], 9, *ids[3:]])
    )
    assert torch.equal(one.values[:3], other.values[:3])
    assert not torch.equal(one.values[3:], other.values[3:])
    assert len(one.values) == len(one.logprobs) == len(one.entropies) == 7


@pytest.mark.parametrize("count", [1, 2])
def test_one_answer_and_equal_scores_give_finite_updates(tokenizer, count):
    cfg, models = models_of(tokenizer, answers=count, new_tokens=1)
    learner, rng = lm.Learner(cfg, models), torch.Generator().manual_seed(0)
    found = learner.update(answers_of(cfg, models, tokenizer), torch.zeros(count), 1.0, rng)
    assert all(torch.tensor(float(value)).isfinite() for value in found.values())


def test_beta_rises_and_falls_with_the_divergence(tokenizer):
    for aim, rises in ((0.01, True), (1e5, False)):
        cfg, models = models_of(tokenizer, kl_aim=aim)
        for _, layer in lora.adapters(models.model):
            layer.parts["policy"].lora_B.data.normal_(generator=torch.Generator().manual_seed(1))  # far away
        learner, rng = lm.Learner(cfg, models), torch.Generator().manual_seed(0)
        found = learner.update(answers_of(cfg, models, tokenizer), torch.randn(8, generator=rng), 1.0, rng)
        assert found["answer_kl"] > 1
        assert found["beta"] == cfg.beta  # that of this update
        assert (learner.beta["value"] > cfg.beta) == rises
    cfg, models = models_of(tokenizer, kl_aim=None)
    learner = lm.Learner(cfg, models)
    learner.update(answers_of(cfg, models, tokenizer), torch.zeros(8), 1.0, rng)
    assert learner.beta["value"] == cfg.beta


# --- Files


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_it_starts_from_an_adapter_of_sft(tokenizer, critic, tmp_path, no_pictures):
    """Policy and critic begin as that adapter, which is the reference; what is saved is for the same base."""
    torch.manual_seed(0)
    base = small_llama(small_config(tokenizer.vocab_size, 64))
    save.model(base, tmp_path / "base", tokenizer)
    lora.apply_lora(base, 4, 8.0, 0.0, ["q", "up"], torch.Generator().manual_seed(0))
    for _, layer in lora.adapters(base):
        layer.parts["default"].lora_B.data.normal_(std=0.1)
    adapters.save_adapter(base, tmp_path / "sft", str(tmp_path / "base"))
    save.tokenizer(tokenizer, tmp_path / "sft")
    rows = "".join(json.dumps({"prompt": f"now the {thing} is"}) + "\n" for thing in ("movie", "hotel", "dog"))
    (tmp_path / "rows.jsonl").write_text(rows)
    cfg = toy(model=str(tmp_path / "sft"), data=tmp_path / "rows.jsonl", raw=True, reward=("length",), steps=1,
              answers=4, new_tokens=6, critic=critic, lr=0.01)  # fmt: skip
    found = execute(INFO, cfg, tmp_path / "run", toy=True)
    assert found["checks"]["first_log_ratio"]["value"] == 0
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    first = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert float(first["answer_kl"]) == 0
    config = json.loads((tmp_path / "run/model/adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    adapters.load_adapter(small_llama(small_config(tokenizer.vocab_size, 64)), tmp_path / "run/model")


def test_the_memory_plan_loads_nothing():
    shape, setup = module.memory_plan(module.Config())
    assert shape.vocab_size == 49152
    assert setup.lora_rank == 16
    assert setup.dtype == "bf16"
    _, separate = module.memory_plan(dataclasses.replace(module.Config(), critic="separate"))
    assert (separate.lora_rank, separate.seq) == (32, 2 * setup.seq)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": ("vadr",)}, "there is no reward 'vadr'"),
        ({"targets": "nothing("}, "nothing"),
        ({"new_tokens": 0}, "--new-tokens 0 is too small"),
        ({"kl_aim": 0.0}, "--kl-aim 0 is too small"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        toy(**change)


def test_one_prompt_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n')
    with pytest.raises(UserError, match="a second one is needed to evaluate on"):
        lm.load_prompts(toy(data=tmp_path / "rows.jsonl", raw=True), toy_tokenizer())


def test_the_rewards_are_those_of_the_library():
    answer = lm.Answer(lm.Prompt("x", [1]), [2], " good", torch.zeros(1))
    found = lm.scorer(dataclasses.replace(module.Config(), reward=("length*2",)))([answer])
    assert found == [2 * rewards.find("length")(["x"], [" good"])[0]]
