"""Rows of every form and kind of file become the same conversations; what is wrong is named by its place."""

import gzip
import json
import sys

import pytest

from finetune.data import conversations, rows
from finetune.data.conversations import FORMS, ROLES, TRAIN_ON, read_any, read_row
from finetune.errors import UserError

WANTED = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}
CALLED = [{"role": "user", "content": "rain?"}, {"role": "assistant", "tool_calls": [CALL]},
          {"role": "tool", "content": "12 mm"}, {"role": "assistant", "content": "yes"}]  # fmt: skip
ROWS = {
    "messages": {"messages": WANTED},
    "sharegpt": {"conversations": [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four"}]},
    "alpaca": {"instruction": "two and two?", "input": "", "output": "four", "text": "### Instruction: …"},
    "prompt": {"prompt": "two and two?", "completion": "four"},
    "prompt-messages": {"prompt": WANTED[:1], "completion": WANTED[1:]},
}


def said(messages):
    return [(message["role"], message.get("content")) for message in messages]


def test_every_form_gives_the_same_conversation():
    assert ROWS.keys() == FORMS.keys()
    for name, row in ROWS.items():
        assert read_any(row) == (name, WANTED)
        assert read_any(row, form=name) == (name, WANTED)


@pytest.mark.parametrize("role", ROLES)
def test_roles_by_every_name(role):
    value = json.dumps(CALL["function"]) if role == "function_call" else "x"
    row = read_row({"conversations": [{"from": role, "value": value}, {"from": "gpt", "value": "y"}]})
    assert row[0]["role"] == ROLES[role]
    assert row[0].get("tool_calls") == ([CALL] if role == "function_call" else None)


def test_alpaca():
    row = {"instruction": "Add", "input": "2 3", "output": "5", "system": "be brief", "history": [["hi", "hello"]]}
    assert said(read_row(row)) == [
        ("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "Add\n2 3"), ("assistant", "5"),
    ]  # fmt: skip
    assert read_row({"instruction": "", "input": "2 3", "output": "5"})[0]["content"] == "2 3"


def test_sharegpt():
    turns = [{"from": "human", "value": "rain?", "weight": 0}, {"from": "function_call", "value": json.dumps(
        {"name": "weather", "arguments": '{"town": "Ulm"}'})}, {"from": "observation", "value": "12 mm"},
        {"from": "gpt", "value": "yes", "train": True}]  # fmt: skip
    row = read_row({"conversations": turns, "system": "s", "tools": '[{"name": "weather"}]'})
    assert row[0] == {"role": "system", "content": "s", "tools": [{"name": "weather"}]}
    assert row[1:] == [*CALLED[:3], CALLED[3] | {"weight": 1}]
    mixed = read_row({"conversation": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]})
    assert said(mixed) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"id": "x"} | CALL | {"function": {"name": "weather", "arguments": '{"town": "Ulm"}'}},
        json.dumps(CALL),
    ],
)
def test_calls_in_every_spelling(call):
    given = call if isinstance(call, str) else [call]
    row = read_row({"messages": [CALLED[0], {"role": "assistant", "content": None, "tool_calls": given}]})
    assert row[1]["tool_calls"][0]["function"] == CALL["function"]
    assert row[1]["tool_calls"][0]["type"] == "function"


def test_what_trl_learns_of_a_prompt_and_its_completion():
    """Only the completion, so nothing that the assistant said in the prompt."""
    prompt = [*WANTED, {"role": "user", "content": "and three?"}]
    row = read_row({"prompt": prompt, "completion": [{"role": "assistant", "content": "five"}]})
    assert [message.get("weight") for message in row] == [None, 0, None, None]
    assert [conversations.learnable(message) for message in row] == [False, False, False, True]


def test_train_on():
    chat = [*WANTED, *WANTED]
    weights = {}
    for what in TRAIN_ON:
        row = read_row({"messages": chat}, train_on=what)
        weights[what] = [message.get("weight", 1) for message in row]
        assert row[0].get("train_on") == ("everything" if what == "everything" else None)
        assert read_row({"messages": chat, "train_on": what}) == row  # the row's own key
    assert weights == {"answers": [1, 1, 1, 1], "last": [1, 0, 1, 1], "everything": [1, 1, 1, 1]}
    assert read_row({"messages": chat, "train_on": "answers"}, train_on="last") == chat
    with pytest.raises(ValueError, match="'train_on' is 'all': it must be one of answers, last, everything"):
        read_row({"messages": chat, "train_on": "all"})


def test_text_parts_and_axolotls_weights():
    parts = [{"type": "text", "text": "two and "}, {"type": "text", "text": "two?"}]
    row = read_row(
        {"messages": [{"role": "user", "content": parts}, WANTED[1], WANTED[0], WANTED[1] | {"train": False}]}
    )
    assert row == [*WANTED, WANTED[0], WANTED[1] | {"weight": 0}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROWS["messages"] | ROWS["sharegpt"], "keys of the forms messages and sharegpt: choose one with --form"),
        (ROWS["alpaca"] | ROWS["prompt"], "keys of the forms alpaca and prompt"),
        ({"instruction": "a", "response": "b"}, "needs 'output' too .found 'instruction', 'response'"),
        ({"question": "a", "answer": "b"}, "the keys of no known form"),
        ({"instruction": "", "input": "", "output": "b"}, "there is no question"),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history' must be a list of .question, answer."),
        ({"prompt": WANTED[:1], "completion": "four"}, "'completion' is a text that is not JSON"),
        ({"prompt": "a", "completion": WANTED[1:]}, "'completion' must be a text, not a list"),
        ({"prompt": WANTED, "completion": WANTED[:1]}, "nothing to learn"),
        (ROWS["sharegpt"] | {"system": 3}, "'system' must be a text"),
        ({"messages": [{"role": "system", "content": "a"}, *WANTED], "system": "b"}, "keep one of them"),
        ({"conversations": [{"from": "critic", "value": "x"}]}, "role 'critic': it must be one of system, developer"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type 'image': only text is supported"),
        ({"messages": [WANTED[0], WANTED[1] | {"train": 1}]}, "must be true or false"),
        ({"messages": [WANTED[0], WANTED[1] | {"train_detail": []}]}, "use the 'weight'"),
        ({"messages": [WANTED[0], WANTED[1] | {"tool_calls": [{"function": {}}]}]}, "has no name of a function"),
        ({"messages": [WANTED[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
         "arguments of 'f' in message 1 must be an object"),
        ({"messages": [WANTED[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
         "arguments of 'f' in message 1 is a text that is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "look it up"}]}, "tool_calls of message 0 is a text"),
        ({"messages": WANTED, "tools": "{"}, "'tools' is a text that is not JSON"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        read_row(row)


# --- Files


def jsonl(path, given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def test_the_form_is_said_once_and_can_be_forced(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [*[ROWS["sharegpt"]] * 1200, ROWS["alpaca"]])
    found, text = rows.read(file)
    assert found == [WANTED] * 1201
    assert text == (
        "1,200 rows of the form sharegpt (conversations: a list of from and value), "
        "1 row of the form alpaca (instruction, input and output)"
    )
    both = jsonl(tmp_path / "both.jsonl", [ROWS["messages"] | ROWS["alpaca"]])
    with pytest.raises(UserError, match=r"line 1: .* messages and alpaca: choose one with --form"):
        rows.read(both)
    assert rows.read(both, "alpaca")[0] == [WANTED]
    with pytest.raises(UserError, match=r"line 1201: 'messages' must be a list"):
        rows.read(jsonl(tmp_path / "y.jsonl", [*[ROWS["messages"]] * 1200, ROWS["alpaca"]]), "messages")
    with pytest.raises(UserError, match=r"--form 'sharegtp': .*did you mean 'sharegpt'"):
        rows.read(file, "sharegtp")


CSV = 'instruction,input,output,history\n"two and two?",,four,\n\n"Say ""a"",\nthen b",x,"a\nb","[[""c"", ""d""]]"\n'


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("end", [end for end in rows.FILES if end != ".parquet"])
def test_every_kind_of_text_file(tmp_path, end, packed):
    many = list(ROWS.values())
    texts = {
        ".jsonl": "\ufeff" + "\r\n".join(map(json.dumps, many)) + "\n\n",
        ".ndjson": "\n".join(map(json.dumps, many)),
        ".json": json.dumps(many, indent=1),
        ".csv": CSV,
        ".tsv": "prompt\tcompletion\nmessages\tfour\n",
    }
    file = tmp_path / f"Rows{end.upper() if packed else end}{'.gz' * packed}"
    raw = texts[end].encode()
    file.write_bytes(gzip.compress(raw[:20]) + gzip.compress(raw[20:]) if packed else raw)  # of two members
    found, _ = rows.read(file)
    if end == ".csv":
        assert found[0] == WANTED
        assert said(found[1]) == [
            ("user", "c"),
            ("assistant", "d"),
            ("user", 'Say "a",\nthen b\nx'),
            ("assistant", "a\nb"),
        ]
    elif end == ".tsv":
        assert said(found[0]) == [("user", "messages"), ("assistant", "four")]
    else:
        assert found == [WANTED] * len(many)


def test_json_by_lines_and_a_folder(tmp_path):
    jsonl(tmp_path / "a.json", [ROWS["prompt"]])
    jsonl(tmp_path / "b.jsonl", [ROWS["alpaca"]])
    (tmp_path / "README.md").write_text("x")
    found, text = rows.read(tmp_path)
    assert found == [WANTED] * 2
    assert text.endswith(" in 2 files: a.json, b.jsonl")


def test_messages_in_a_table(tmp_path):
    (tmp_path / "a.csv").write_text(
        'messages,tools\n"' + json.dumps(CALLED).replace('"', '""') + '","[{""name"": ""f""}]"\n'
    )
    ((first, *rest),) = rows.read(tmp_path / "a.csv")[0]
    assert [first, *rest] == [CALLED[0] | {"tools": [{"name": "f"}]}, *CALLED[1:]]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b"{}", "the kind of file is told by its ending: .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
        ("a.parquet.gz", b"", "the kind of file is told by its ending"),
        ("a.json", b'[{"prompt": "a", "completion": "b"}, {"prompt": "a"}]', "a.json, row 2: the row needs 'comp"),
        ("a.json", b"[{]", "a.json: not JSON .* at line 1, column 3.: it must be a list of objects"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "a.json: "),
        ("a.csv", b"prompt,completion\na,b\nc\n", "line 3: 1 cells under 2 names of columns"),
        ("a.csv", b'prompt,completion\n"a\nb",c\n"d,e\n', "a.csv, line 4: unexpected end of data"),
        ("a.csv", b"prompt,prompt\na,b\n", "two columns have the same name"),
        ("a.csv", b"prompt,completion\na,\xff\n", "byte 21 is not UTF-8"),
        ("a.csv", b"prompt,completion\na,b\n\n\"c\nd\",\n", "line 4: the row needs 'completion' too"),
        ("a.csv", b"", "holds no rows"),
        ("a.jsonl.gz", b"{}", "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "is not a whole gzip file"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as Parquet|needs pyarrow"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message) as caught:
        rows.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LIMIT", 1 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * (1 << 22)))
    with pytest.raises(UserError, match="unpacks to more than the 1,048,576 bytes that are read"):
        rows.read(tmp_path / "a.jsonl.gz")


# --- Parquet


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"a\.parquet: reading Parquet needs pyarrow: pip install 'finetune-lab\[data\]'"
    ):
        rows.read(tmp_path / "a.parquet")


@pytest.mark.peer
def test_parquet_as_datasets_saves_it(tmp_path):
    """The same rows as from JSON lines: structs of lists, fields that other rows have, a column that nothing reads."""
    from datasets import Dataset

    call = {"function": {"name": "weather", "arguments": json.dumps({"town": "Ulm"})}, "type": "function"}
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}],
        [CALLED[0], {"role": "assistant", "content": None, "tool_calls": [call]}, *CALLED[2:]],
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    given = [{"messages": chats[0], "image": b"\xff\x00"}, {"messages": chats[1], "tools": tools, "image": b"\x00"}]
    Dataset.from_list([{"tools": None} | row for row in given]).to_parquet(tmp_path / "a.parquet")
    plain = [{k: v for k, v in row.items() if k != "image"} for row in given]
    assert rows.read(tmp_path / "a.parquet")[0] == rows.read(jsonl(tmp_path / "a.jsonl", plain))[0]
    Dataset.from_list([ROWS["alpaca"]] * 3).to_parquet(tmp_path / "b.parquet")
    assert rows.read(tmp_path / "b.parquet")[0] == [WANTED] * 3
    Dataset.from_list([{"question": "a"}]).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: it has the columns of no known form .found 'question'"):
        rows.read(tmp_path / "c.parquet")
    Dataset.from_list([ROWS["prompt"], {"prompt": "a", "completion": None}]).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet, row 2: the row needs 'completion' too"):
        rows.read(tmp_path / "d.parquet")
