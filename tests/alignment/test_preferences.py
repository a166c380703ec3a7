"""Rows of preferences: every form that people have, faults by line, and what becomes of them in tokens."""

import json

import pytest

from finetune.alignment import preferences
from finetune.alignment.preferences import Judged, Pair, Prompt
from finetune.errors import UserError
from finetune.lm.tokenizer import Tokenizer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


WANTED = Pair([user("Name?")], [says("Ada")], [says("no")])
HUMAN = "\n\nHuman: Name?\n\nAssistant:"
PAIRS = {
    "texts": {"prompt": "Name?", "chosen": "Ada", "rejected": "no"},
    "messages": {"prompt": [user("Name?")], "chosen": [says("Ada")], "rejected": [says("no")]},
    "one message": {"prompt": [user("Name?")], "chosen": says("Ada"), "rejected": says("no")},
    "answers of text": {"messages": [user("Name?")], "chosen": "Ada", "rejected": "no"},
    "sharegpt": {
        "messages": [{"from": "human", "value": "Name?"}],
        "chosen": {"from": "gpt", "value": "Ada"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "whole": {"chosen": [user("Name?"), says("Ada")], "rejected": [user("Name?"), says("no")]},
    "prompt and whole": {
        "prompt": [user("Name?")],
        "chosen": [user("Name?"), says("Ada")],
        "rejected": [user("Name?"), says("no")],
    },
    "null": {"prompt": "Name?", "chosen": "Ada", "rejected": "no", "messages": None},
    "cells": {"prompt": json.dumps([user("Name?")]), "chosen": json.dumps([says("Ada")]), "rejected": "no"},
}


@pytest.mark.parametrize("name", PAIRS)
def test_forms_of_pairs(name: str):
    assert preferences.read_row(PAIRS[name]) == WANTED


def test_other_keys_are_columns():
    row = PAIRS["texts"] | {"source": "me", "score": 3}
    assert preferences.read_row(row).columns == {"source": "me", "score": 3}


def test_whole_texts():
    row = {"chosen": HUMAN + " I am Ada", "rejected": HUMAN + " I do not tell"}
    assert preferences.read_row(row, raw=True) == Pair(HUMAN, " I am Ada", " I do not tell")
    row = {"chosen": "The sky is blue today", "rejected": "The sky is bleak"}
    assert preferences.read_row(row, raw=True) == Pair("The sky is", " blue today", " bleak")
    row = {"chosen": "The sky is blue", "rejected": "The sky is blue and far"}
    assert preferences.read_row(row, raw=True) == Pair("The sky is", " blue", " blue and far")


def test_earlier_answers_belong_to_the_prompt():
    first = [user("Hello"), says("Hi"), user("Name?")]
    row = {"chosen": [*first, says("Ada")], "rejected": [*first, says("no")]}
    assert preferences.read_row(row) == Pair(first, [says("Ada")], [says("no")])


def test_judged_and_prompts():
    row = {"prompt": "Name?", "completion": "Ada", "label": True}
    assert preferences.read_row(row) == Judged([user("Name?")], [says("Ada")], True)
    assert preferences.read_row(row | {"label": "false"}, raw=True) == Judged("Name?", "Ada", False)
    assert preferences.read_row({"prompt": "3 + 4 =", "answer": 7}, raw=True) == Prompt("3 + 4 =", {"answer": 7})


def test_a_pair_is_two_judgments_and_one_prompt(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PAIRS["texts"] | {"n": 1}))
    assert preferences.read(file, "judged") == [
        Judged(WANTED.prompt, WANTED.chosen, True, {"n": 1}),
        Judged(WANTED.prompt, WANTED.rejected, False, {"n": 1}),
    ]
    assert preferences.read(file, "prompts") == [Prompt(WANTED.prompt, {"n": 1})]


FAULTS = [
    (PAIRS["texts"] | {"rejected": "Ada"}, "'chosen' and 'rejected' are the same"),
    (PAIRS["messages"] | {"rejected": [says("Ada")]}, "'chosen' and 'rejected' are the same"),
    ({"chosen": HUMAN + " a", "rejected": HUMAN + " a"}, "'chosen' and 'rejected' are the same"),
    (PAIRS["texts"] | {"chosen": " "}, "'chosen' is empty"),
    (PAIRS["texts"] | {"prompt": ""}, "'prompt' is empty"),
    (PAIRS["texts"] | {"messages": [user("x")]}, "'prompt' and 'messages': keep one"),
    (PAIRS["messages"] | {"prompt": [user("Name?"), says("x")]}, "'prompt' ends with an answer"),
    (PAIRS["messages"] | {"chosen": [user("Ada")]}, "'chosen' must be the assistant's messages"),
    (PAIRS["messages"] | {"chosen": [{"role": "robot", "content": "x"}]}, "'chosen': message 0 has the role 'robot'"),
    (PAIRS["messages"] | {"chosen": []}, "'chosen' must be a text or a list of messages"),
    ({"chosen": "one", "rejected": "two"}, "no beginning in common"),
    ({"chosen": [says("a")], "rejected": [says("b")]}, "no beginning in common"),
    ({"chosen": "one", "rejected": [says("b")]}, "both be texts or both be lists"),
    ({"prompt": "a", "completion": "b", "label": 2}, "'label' is 2: it must be true"),
    ({"prompt": "a", "completion": "b"}, "needs 'chosen' and 'rejected'"),
    ({"question": "a"}, r"no known form \(found 'question'\)"),
    (["a"], "must be a JSON object, not a list"),
    (PAIRS["texts"] | {"chosen": "\ud800"}, "half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "match"), FAULTS, ids=[match[:30] for _, match in FAULTS])
def test_faults_are_named_by_line(tmp_path, row, match: str):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PAIRS["texts"]) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"rows.jsonl, line 3: .*{match}") as caught:
        preferences.read(file, "pairs")
    assert "\n" not in str(caught.value)


def test_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no rows: each must have one of the forms pair"):
        preferences.read(tmp_path / "rows.jsonl", "pairs")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Name? Ada, no. The sky is blue, Hello Hi"], 300)


def learned(tokenizer: Tokenizer, document) -> str:
    return tokenizer.decode([i for i, learn in zip(document.ids, document.mask, strict=True) if learn])


def test_only_the_answer_is_learned(tokenizer: Tokenizer):
    first = [user("Hello"), says("Hi"), user("Name?")]
    for answer in ("Ada", "no"):
        document = preferences.document(tokenizer, first, [says(answer)])
        assert learned(tokenizer, document).removesuffix("\n") == f"{answer}{tokenizer.eos}"
        prompt = preferences.prompt_ids(tokenizer, first)
        assert list(document.ids[: len(prompt)]) == prompt
        assert not any(document.mask[: len(prompt)])


def test_texts_are_continued_as_they_stand(tokenizer: Tokenizer):
    document = preferences.document(tokenizer, "The sky is", " blue")
    assert tokenizer.decode(list(document.ids)) == f"The sky is blue{tokenizer.eos}"
    assert learned(tokenizer, document) == f" blue{tokenizer.eos}"


def test_pairs_that_do_not_fit_are_skipped_and_counted(tokenizer: Tokenizer):
    long = Pair(WANTED.prompt, WANTED.chosen, [says("no " * 100)])
    said: list[str] = []
    found = preferences.documents(tokenizer, [WANTED, long], 64, said.append)
    assert len(found) == 1
    assert said == ["1 of 2 pairs are longer than 64 tokens and skipped"]
    with pytest.raises(UserError, match="no pair fits 8 tokens: raise --max-length"):
        preferences.documents(tokenizer, [WANTED], 8)


def test_a_twentieth_of_the_prompts_is_held_out_whatever_their_order():
    pairs = [Pair(f"prompt {i % 40}", f"good {i}", f"bad {i}") for i in range(120)]
    train, held_out = preferences.split(pairs, "a.jsonl")
    prompts = {pair.prompt for pair in held_out}
    assert len(prompts) == 2
    assert prompts.isdisjoint(pair.prompt for pair in train)
    assert len(train) + len(held_out) == 120
    assert {pair.prompt for pair in preferences.split(pairs[::-1], "a.jsonl")[1]} == prompts
    with pytest.raises(UserError, match=r"a\.jsonl has one prompt only"):
        preferences.split(pairs[::40], "a.jsonl")


def test_a_prompt_for_people_is_its_text_or_its_last_message():
    assert preferences.shown("as it is") == "as it is"
    assert preferences.shown([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]) == "hi"
