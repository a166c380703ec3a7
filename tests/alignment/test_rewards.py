"""Rewards: the project's, a user's file, and functions that fail; verifiers against right answers and exploits."""

import pytest
import torch

from finetune.alignment import rewards, vader, verifiers
from finetune.errors import UserError
from finetune.runs import wheels


@pytest.fixture
def lexicon(monkeypatch: pytest.MonkeyPatch):
    """Four words in place of the wheel's."""
    lines = "good\t1.9\t0.9\t[2]\nbad\t-2.5\t0.6\t[-3]\nlove\t3.2\t0.4\t[3]\n:)\t2.0\t1.1\t[2]\ncan't\t-0.1\t0\t[0]\n"
    monkeypatch.setattr(wheels, "member", lambda wheel, name: lines.encode())
    vader.lexicon.cache_clear()
    yield
    vader.lexicon.cache_clear()


def test_vader_is_a_sum_over_words(lexicon: None):
    assert vader.lexicon() == {"good": 1.9, "bad": -2.5, "love": 3.2, "can't": -0.1}
    score = rewards.find("vader")
    texts = ["Good, good!", "'bad' goods", "love love", "", "I can't :)"]
    assert score([""] * 5, texts) == pytest.approx([3.8, -2.5, 6.4, 0.0, -0.1])


@pytest.mark.long
def test_the_real_lexicon():
    known = vader.lexicon()
    assert len(known) > 6000
    assert (known["love"], known["terrible"]) == (3.2, -2.1)


# Right answers that a model may give, and the attempts that must not pay.
RIGHT = [" 7", "7", " 7\n", "7.", " 7, I think", "\n7", " 07", " 7 apples", "7!"]
WRONG = ["", " ", "8", "7.5", "7,5", "70", "-7", " seven", "x7", "3 + 4 = 7", "7 + 1", "7 8 9", "8 7",
         "the answer is 7", "٧", "７", "7²", "7e3", "7/1", "7 = 7", "+7", "1234567", "7-0"]  # fmt: skip


@pytest.mark.parametrize("completion", RIGHT)
def test_right_sums_count(completion: str):
    assert verifiers.right_sum(["2 + 5 = 7\n3 + 4 ="], [completion]) == [1.0]


@pytest.mark.parametrize("completion", WRONG)
def test_what_is_not_the_answer_does_not(completion: str):
    assert verifiers.right_sum(["2 + 5 = 7\n3 + 4 ="], [completion]) == [0.0]


def test_sums():
    asked = {"-3 + 4 =": 1, "12*12=": 144, "5 - 9 = ": -4, "999999 + 1 =": 1_000_000}
    for prompt, wanted in asked.items():
        assert verifiers.right_sum([prompt], [f" {wanted}"]) == [1.0]
    assert verifiers.right_sum(["999999 + 1 ="], ["1,000,000"]) == [1.0]
    assert verifiers.right_sum(["999999 + 1 ="], ["1,00,000"]) == [0.0]
    for prompt in ("hello", "1.5 + 2 =", "3 + 4 = 7", ""):
        with pytest.raises(UserError, match="the reward sum raised ValueError: the prompt does not end with a sum"):
            rewards.find("sum")([prompt], ["7"])


def test_format_and_length():
    texts = ["7", " -12 ", "7.", "seven", "", "٧", "1 2"]
    assert rewards.find("format")([""] * 7, texts) == [1, 1, 0, 0, 0, 0, 0]
    assert rewards.find("length")(["", ""], ["a b  c", ""]) == [3, 0]


def test_a_users_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def even(prompts, completions, **_):\n    return [len(c) % 2 == 0 for c in completions]\n")
    found = rewards.find(f"{file}:even*0.5")
    assert (found.weight, found.file) == (0.5, file)
    sums, each = rewards.total([found, rewards.find("length*-2")], ["p", "p"], ["ab", "abc"])
    assert sums == [0.5 - 2, -2]
    assert each == {f"{file}:even": [1, 0], "length": [1, 1]}


def test_columns_reach_the_function(tmp_path):
    file = tmp_path / "answers.py"
    file.write_text(
        "def same(prompts, completions, answer):\n    return [a == c for a, c in zip(answer, completions)]\n"
    )
    assert rewards.find(f"{file}:same")(["", ""], ["x", "y"], answer=["x", "x"]) == [1.0, 0.0]


FAULTS = {
    "return [1.0]": r"returned 1 numbers for 2 completions",
    "return [1.0, float('nan')]": r"is nan for the completion 'second'",
    "return [float('inf'), 0]": r"is inf for the completion 'first'",
    "return None": r"must return a list of numbers, not 'None'",
    "return [None, 1]": r"must return a list of numbers, not '\[None, 1\]'",
    "return 1 / 0": r"raised ZeroDivisionError: division by zero \(faulty.*\.py, line 2\)",
}


@pytest.mark.parametrize("body", FAULTS)
def test_a_reward_that_fails_is_named_in_one_line(tmp_path, body: str):
    file = tmp_path / f"faulty{abs(hash(body))}.py"
    file.write_text(f"def mine(prompts, completions, **_):\n    {body}\n")
    with pytest.raises(UserError, match=r"the reward .*:mine " + FAULTS[body]) as caught:
        rewards.find(f"{file}:mine")(["", ""], ["first", "second"])
    assert "\n" not in str(caught.value)


def test_unknown_rewards(tmp_path):
    (tmp_path / "mine.py").write_text("def even(prompts, completions, **_):\n    return []\n")
    for name, match in (
        ("vadr", r"no reward 'vadr'.*vader, sum, format, length.*did you mean|vader"),
        ("vader*x", r"'x' is not a weight"),
        ("vader*nan", r"'nan' is not a weight"),
        (f"{tmp_path}/none.py:f", r"there is no file"),
        (f"{tmp_path}/mine.py:evn", r"has no function 'evn'.*even"),
    ):
        with pytest.raises(UserError, match=match):
            rewards.find(name)


def test_a_scale_has_mean_0_and_deviation_1_of_the_references_rewards():
    raw = torch.tensor([3.0, 5.0, 10.0])
    found = rewards.Scale.of(raw)(raw)
    assert found.mean().abs() < 1e-6
    assert found.std() == pytest.approx(1)
    assert rewards.Scale(2.0, 4.0, clip=1.5)(torch.tensor([2.0, 6.0, 100.0, -100.0])).tolist() == [0, 1, 1.5, -1.5]
    assert rewards.Scale.of(torch.full((4,), 2.0))(torch.tensor([2.0, 3.0])).tolist() == [0, 1]  # never earned before
    assert rewards.Scale.of(torch.tensor([5.0]))(torch.tensor([5.0])).tolist() == [0]
