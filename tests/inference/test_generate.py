"""Generation: batches and sampling on small random models; SmolLM2 token for token with transformers."""

import json
import re

import pytest
import torch
from small_gguf import TEXT, tiny
from small_lms import model as model

from finetune.chat import answer
from finetune.cli import main as command
from finetune.errors import UserError
from finetune.inference.generate import generate
from finetune.inference.sampler import warp
from finetune.lm.io import save
from finetune.lm.tokenizer import Tokenizer
from finetune.peft.adapters import save_adapter
from finetune.peft.lora import apply_lora

PROMPTS = [[5, 17, 3], [42], [9, 8, 7, 6, 5, 4, 3, 2, 1], [11] * 6]


@torch.no_grad()
def recompute(model, prompt, steps):
    """Greedy without a cache: the definition."""
    row = list(prompt)
    for _ in range(steps):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


def test_cache_and_batch_change_nothing(model):
    wanted = [recompute(model, prompt, 20) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 20) == wanted
    assert [generate(model, [prompt], 20)[0] for prompt in PROMPTS] == wanted
    assert len({tuple(row) for row in wanted}) == len(PROMPTS)


def test_padded_tensors_are_the_same_as_lists(model):
    width = max(map(len, PROMPTS))
    wanted = generate(model, PROMPTS, 10)
    for left in (True, False):
        gaps = [[0] * (width - len(prompt)) for prompt in PROMPTS]
        rows = [gap + prompt if left else prompt + gap for gap, prompt in zip(gaps, PROMPTS, strict=True)]
        ones = [[1] * len(prompt) for prompt in PROMPTS]
        mask = [gap + one if left else one + gap for gap, one in zip(gaps, ones, strict=True)]
        assert generate(model, torch.tensor(rows), 10, attention_mask=torch.tensor(mask)) == wanted
    assert generate(model, torch.tensor([PROMPTS[0]]), 10) == wanted[:1]


def test_stop_ids_end_each_row_alone(model):
    free = generate(model, PROMPTS, 20)
    stops = {free[0][4], free[2][9]}
    cut = []
    for row in free:
        ends = [i for i, token in enumerate(row) if token in stops]
        cut.append(row[: ends[0] + 1] if ends else row)
    assert generate(model, PROMPTS, 20, stop_ids=stops) == cut
    assert len(cut[0]) <= 5


def test_sampling_is_seeded_and_greedy_in_the_limit(model):
    def draw(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, PROMPTS, 12, generator=generator, **({"temperature": 1.0} | settings))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    greedy = generate(model, PROMPTS, 12)
    assert draw(1, top_k=1) == greedy
    assert draw(1, top_p=1e-6) == greedy
    assert draw(1, temperature=1e-4) == greedy


def test_a_sampled_row_depends_on_its_prompt_and_its_seed_alone(model):
    """Seeds are drawn from the generator in the order of the prompts."""

    def draw(prompts):
        return generate(model, prompts, 12, temperature=1.0, top_p=0.9, generator=torch.Generator().manual_seed(3))

    together = draw(PROMPTS)
    assert draw(PROMPTS[:2]) == together[:2]
    assert draw([*PROMPTS[:3], [1]])[:3] == together[:3]
    assert draw([PROMPTS[0]] * 2)[0] != draw([PROMPTS[0]] * 2)[1]


def test_warp_by_hand():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()

    def kept(**settings):
        return warp(logits, **settings).isfinite()[0].tolist()

    assert kept() == [True] * 5
    assert kept(top_k=2) == [True, True, False, False, False]
    assert kept(top_p=0.69) == [True, True, False, False, False]
    assert kept(top_p=0.71) == [True, True, True, False, False]
    assert kept(top_p=0.01) == [True, False, False, False, False]
    assert kept(top_k=99) == [True] * 5
    # temperature comes first: at 4 the distribution is flatter, and .69 takes four
    assert kept(temperature=4.0, top_p=0.69) == [True, True, True, True, False]
    torch.testing.assert_close(warp(logits, temperature=0.5), logits * 2)


def test_nothing_to_do(model):
    assert generate(model, [], 5) == []
    assert generate(model, PROMPTS, 0) == [[], [], [], []]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([[1], []], 5), "prompt 1 is empty"),
        (([[1], [97]], 5), "token 97 is not in the vocabulary"),
        (([[1] * 60], 5), "prompt 0 has 60 tokens; with 5 new ones it does not fit the model's maximum length of 64"),
        (([[1]], -1), "max_new_tokens"),
        (([[1]], 5, -0.1), "temperature"),
        (([[1]], 5, 1.0, -1), "top_k"),
        (([[1]], 5, 1.0, 0, 0.0), "top_p"),
        ((torch.tensor([1]), 5), "batch, time"),
    ],
)
def test_bad_input(model, arguments, match):
    with pytest.raises(UserError, match=match):
        generate(model, *arguments)


def test_full_length_is_allowed(model):
    assert len(generate(model, [[1] * 59], 5)[0]) == 5


@pytest.mark.peer
def test_warp_equals_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(50, 200) * 3
    logits[:, 7] = logits[:, 9]  # a tie
    for temperature, top_k, top_p in ((0.7, 20, 0.9), (1.3, 5, 0.5), (1.0, 50, 0.95), (2.0, 3, 0.99)):
        theirs = TemperatureLogitsWarper(temperature)(None, logits)
        theirs = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, theirs))
        assert torch.equal(warp(logits, temperature, top_k, top_p), theirs)


QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain what a Python decorator is.",
    "List three colors.",
    "Why is the sky blue? Answer in detail, please, and give an example from everyday life.",
    "Translate 'good morning' into Spanish.",
    "How do I sort a list in Python?",
    "Tell me a short story about a robot.",
    "What is 17 + 25?",
    "Give me a recipe for pancakes with exact amounts and numbered steps.",
]


@pytest.mark.peer
def test_smollm2_greedy_equals_transformers(smollm2_model, smollm2_peer, smollm2_tokenizer):
    """10 prompts × 64 tokens, ours as one batch of unequal rows, theirs left-padded; also a single row and no cache."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [smollm2_tokenizer.render(chat, add_generation_prompt=True)[0] for chat in chats]
    width = max(map(len, prompts))
    rows = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    smollm2_peer.generation_config.eos_token_id = None  # all 64 tokens, past the ends of the answers
    theirs = smollm2_peer.generate(rows, attention_mask=mask, max_new_tokens=64, do_sample=False)[:, width:].tolist()
    assert generate(smollm2_model, prompts, 64) == theirs
    assert generate(smollm2_model, prompts[:1], 64) == theirs[:1]
    assert recompute(smollm2_model, prompts[1], 4) == theirs[1][:4]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--temperature", "nan"], "temperature must be 0 or"),
        (["--temperature", "1e-45"], "temperature must be 0 or"),
        (["--temperature", "inf"], "temperature must be 0 or"),
        (["--top-p", "nan"], "top_p"),
        (["--seed", str(1 << 64)], "seed"),
        (["--threads", "99999999999"], "threads"),
        (["--max-new-tokens", str(1 << 40)], "max-new-tokens"),
        (["--max-new-tokens", "1000"], "with 1000 new ones it does not fit the model"),
        (["--base", "x"], "is not an adapter, so it has no base model"),
        (["--top-k", "-1"], "top-k"),
    ],
)
def test_settings_that_cannot_be_generated_with(tmp_path, capsys, words, match):
    folder = tmp_path / "model"
    save.model(tiny(), folder, Tokenizer.train([TEXT], 300))
    assert command(["generate", "--model", str(folder), "--prompt", "hi", "--threads", "1", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(match, error)


def test_an_adapter_whose_base_has_moved(tmp_path, capsys):
    model = tiny()
    save.model(model, tmp_path / "base", Tokenizer.train([TEXT], 300))
    apply_lora(model, rank=2, generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    words = ["generate", "--model", str(tmp_path / "adapter"), "--prompt", "def f(x)", "--threads", "1"]
    words += ["--max-new-tokens", "4"]
    assert command(words) == 0
    wanted = capsys.readouterr().out
    (tmp_path / "base").rename(tmp_path / "moved")
    assert command(words) == 2
    assert re.search("base model of the adapter .* is not found .*: give it with --base", capsys.readouterr().err)
    assert command([*words, "--base", str(tmp_path / "moved")]) == 0
    assert capsys.readouterr().out == wanted
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    assert command(words) == 2
    assert "does not name its base model" in capsys.readouterr().err


def test_what_ends_an_answer_is_neither_passed_nor_said(tmp_path):
    """Lists of both files, an added token that is not special; the model writes one token for ever."""
    from tokenizers import AddedToken

    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.backend.add_tokens([AddedToken("<stop>", special=False, normalized=False)])
    model = tiny(vocab_size=310)
    with torch.no_grad():  # every state is the same, and so is the token that follows
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1)
        model.embed.weight[:, 0] = 1
        model.embed.weight[301:, 0] = 2
        model.embed.weight[300, 0] = 3  # "<stop>"
    save.model(model, tmp_path, tokenizer)
    given = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 5, "threads": 1}
    assert answer(str(tmp_path), ["hi"], False, **given) == ["<stop>" * 5]
    for name, ids in (("config.json", 300), ("config.json", [2, 300]), ("generation_config.json", [300])):
        file = tmp_path / name
        whole = file.read_text()
        file.write_text(json.dumps(json.loads(whole) | {"eos_token_id": ids}))
        assert answer(str(tmp_path), ["hi"], False, **given) == [""]
        file.write_text(whole)
    with torch.no_grad():
        model.embed.weight[305, 0] = 4  # a row of the table without a token
    save.model(model, tmp_path, tokenizer)
    assert answer(str(tmp_path), ["hi", "f(x)"], False, **given) == ["", ""]
