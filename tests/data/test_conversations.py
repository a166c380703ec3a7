"""Rows, tokens with a mask, packing, batches; questions and answers from Python's documentation."""

import json
import random

import pytest
import torch

from finetune.data import conversations, packing, python_docs, rows
from finetune.data.packing import Document
from finetune.data.python_docs import Pair
from finetune.errors import UserError
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer

GOOD = {"prompt": "two and two?", "completion": "four"}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def write(tmp_path, *lines):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return file


def test_both_forms_of_rows(tmp_path):
    file = write(tmp_path, GOOD, b"  ", {"messages": [USER, ASSISTANT | {"name": "x"}], "source": 3})
    first, second = rows.read(file)[0]
    assert first == [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    assert second == [USER, ASSISTANT | {"name": "x"}]
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")  # as Windows editors save
    assert rows.read(file)[0] == [first]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b'{"prompt": "\xff"}', "byte 13 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        ([GOOD], "must be a JSON object, not a list"),
        ("text", "must be a JSON object, not a text"),
        ({}, "found no keys"),
        ({"prompt": "a"}, "needs 'completion' too"),
        ({"text": "a"}, r"no known form .found 'text'.: they are messages .*; sharegpt .*; alpaca"),
        ({"prompt": 3, "completion": "b"}, "'prompt' must be a text, not a number"),
        ({"prompt": "a", "completion": None}, "'completion' must be a text, not nothing"),
        ({"prompt": "a", "completion": " \n"}, "'completion' is empty"),
        ({"prompt": "a", "completion": "\ud800"}, "half of a surrogate pair as its character 1"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "'messages' is a text that is not JSON"),
        ({"messages": [USER, "hello"]}, "message 1 must be an object with role and content, not a text"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 0 has the role 'bot'"),
        ({"messages": [USER, {"role": "assistant"}]}, "content of message 1 .assistant. must be a text"),
        ({"messages": [USER, {"role": "system", "content": "x"}, ASSISTANT]}, "only the first may be one"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "no assistant message with a text to learn"),
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "message 1 has the weight 0.5"),
        ({"messages": [USER | {"weight": 1}, ASSISTANT]}, "message 0 has the weight 1"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": "f"}]}, "tool_calls of message 1 is a text that is not JSON"),
        ({"messages": [USER, ASSISTANT | {"reasoning_content": 3}]}, "reasoning_content of message 1 must be a text"),
        ({"messages": [USER, ASSISTANT | {"function_call": {}}]}, "write it as 'tool_calls'"),
        ({"messages": [USER | {"tools": []}, ASSISTANT]}, "put it next to 'messages'"),
        ({"messages": [USER, ASSISTANT | {"name": "\ud800"}]}, "half of a surrogate pair"),
        (GOOD | {"tools": {}, "documents": 3}, "'documents' must be a list of objects"),
        (GOOD | {"tools": ["f"]}, "'tools' must be a list of objects"),
        (GOOD | {"functions": [{}]}, "'functions' is not supported"),
        (GOOD | {"images": ["x.png"]}, "'images' is not supported"),
        (GOOD | {"weight": 0}, "'weight' is not supported"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path, line, message):
    file = write(tmp_path, GOOD, b"", line, GOOD)
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 3: .*({message})"):
        rows.read(file)[0]


def test_what_a_row_holds_in_addition_to_texts_is_kept(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    answer = {"role": "assistant", "tool_calls": [call], "content": None, "thinking": "hm", "name": None}
    messages = [USER, answer, {"role": "tool", "content": "2"}, ASSISTANT | {"weight": 1}]
    tools = [{"type": "function"}]
    ((row,), _) = rows.read(write(tmp_path, {"messages": messages, "tools": tools, "documents": []}))
    assert row[0] == USER | {"tools": tools}
    assert row[1] == {"role": "assistant", "tool_calls": [call], "thinking": "hm"}
    assert row[2:] == messages[2:]
    assert conversations.exchanges(row) == [3]
    ((row,), _) = rows.read(write(tmp_path, GOOD | {"documents": [{"title": "t"}]}))
    assert row[0]["documents"] == [{"title": "t"}]


def test_exchanges_and_dealt_answers():
    bot = [ASSISTANT | {"content": text} for text in "abc"]
    assert conversations.exchanges([bot[0], USER, bot[1], USER, bot[2] | {"weight": 0}, USER]) == [2]
    assert conversations.exchanges([bot[0]]) == []
    assert conversations.with_answer_of([USER, bot[0], USER], [bot[1] | {"tools": [1]}]) == [USER, bot[1]]
    assert conversations.with_answer_of([bot[0] | {"tools": [1]}], [USER, bot[2]]) == [bot[2] | {"tools": [1]}]


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        rows.read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no rows"):
        rows.read(write(tmp_path, b" ", b""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is a folder with no file that ends in"):
        rows.read(tmp_path / "empty")


# --- tokens


def test_tokenize_cuts_and_leaves_out():
    tokenizer = Tokenizer.train(["a b c d"], 259)  # a token for each letter
    found = [[USER | {"content": "x" * asked}, ASSISTANT | {"content": "y" * said}] for asked, said in
             ((1, 1), (1, 30), (60, 1))]  # fmt: skip
    said = []
    documents = packing.tokenize(found, tokenizer, 50, say=said.append)
    assert [(len(d), d.learned) for d in documents] == [(23, 2), (50, 30)]
    assert said == ["of 3 conversations 1 were cut to 50 tokens and 1 dropped"]
    assert packing.needed(documents, 50) is documents
    with pytest.raises(UserError, match="no row has an answer within 2 tokens"):
        packing.needed(packing.tokenize(found, tokenizer, 2), 2)


def test_a_token_of_prompt_and_answer_is_said():
    tokenizer = Tokenizer.train(["Bot: yes Bot: no" * 9], 300)
    said = []
    for source in ("Bot: ", "Bot:"):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content if m.role == 'user' else '" + source + "' + m.content }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '" + source + "' }}{% endif %}"
        )
        (document,) = packing.tokenize([[USER, ASSISTANT | {"content": "yes"}]], tokenizer, 50, say=said.append)
        kept = tokenizer.decode([i for i, learned in zip(document.ids, document.mask, strict=True) if learned])
        assert kept == {"Bot: ": " yes", "Bot:": "yes"}[source]
    endless = "1 texts end without a token that ends an answer: the model does not learn from them to stop"
    assert said[0] == said[2] == endless
    assert said[1].startswith("1 answers begin within a token that begins in the text before them")
    assert len(said) == 3


def test_held_out_of_what_fits():
    documents = [Document([i, i], [0, 1]) for i in [*range(30), 3, 4, 5]]
    train, held_out = packing.held_out_of(documents, 9)
    assert len(train) + len(held_out) == 33
    assert held_out
    assert not {tuple(d.ids) for d in train} & {tuple(d.ids) for d in held_out}
    with pytest.raises(UserError, match="one row only has an answer within 9 tokens"):
        packing.held_out_of(documents[:1] * 3, 9)
    packing.check_vocabulary(documents, 30)
    with pytest.raises(UserError, match="have token 29, the model has 29"):
        packing.check_vocabulary(documents, 29)


def test_only_answers_and_their_ends_are_learned(smollm2_tokenizer):
    row = [USER, ASSISTANT, {"role": "user", "content": "bye"}, {"role": "assistant", "content": "see you"}]
    ids, mask = smollm2_tokenizer.render(row)
    learned = smollm2_tokenizer.decode([token for token, m in zip(ids, mask, strict=True) if m])
    assert learned == "hello<|im_end|>see you<|im_end|>"


def test_collate():
    batch = packing.collate([Document([5, 6, 7], [0, 0, 1]), Document([8, 9], [0, 1]), Document([4], [1])])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch.targets.tolist() == [[-100, 7, -100, 9, -100, -100]]  # the last of one never predicts the next's first
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.learned == 2


def test_packed_logits_are_the_documents_own():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=50, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=64))
    draw = random.Random(0)
    documents = [Document([draw.randrange(50) for _ in range(n)], [1] * n) for n in (1, 17, 2, 30)]
    batch = packing.collate(documents)
    packed = model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens)[0]
    for document, part in zip(documents, packed.split([len(d) for d in documents]), strict=True):
        alone = model(torch.tensor([document.ids]))[0]
        assert (part - alone).abs().max() <= 2e-6 * alone.abs().max()
    changed = model(
        batch.tokens.clone().index_fill_(1, torch.arange(18), 3), positions=batch.positions, cu_seqlens=batch.cu_seqlens
    )
    assert torch.equal(changed[0, 18:], packed[18:])  # nothing of the first two reaches the others


# --- packing


@pytest.mark.parametrize("seed", range(5))
def test_pack_uses_every_row_once_and_never_overfills(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 100) for _ in range(draw.randint(0, 300))]
    bins = packing.pack(lengths, 100)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b and sum(lengths[i] for i in b) <= 100 for b in bins)
    least = -(-sum(lengths) // 100)
    assert len(bins) <= 11 / 9 * least + 1  # the bound of best-fit decreasing (Johnson 1974)


def test_pack_refuses_what_fits_nowhere():
    for length in (0, 11):
        with pytest.raises(ValueError, match="between 1 and 10"):
            packing.pack([3, length], 10)


@pytest.mark.peer
def test_pack_equals_trls(monkeypatch):
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    draw = random.Random(0)
    lengths = [draw.choice([draw.randint(1, 64), draw.randint(1, 12)]) for _ in range(400)]
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[i] * n for i, n in enumerate(lengths)]}), 64, "bfd")
    want = [list(dict.fromkeys(row["input_ids"])) for row in theirs]
    assert sorted(map(sorted, packing.pack(lengths, 64))) == sorted(map(sorted, want))


def test_batches_go_through_permutations():
    def generator(epoch):
        return torch.Generator().manual_seed(epoch)

    drawn = [i for step in range(9) for i in packing.batch_indices(6, 4, step, generator)]
    for epoch in range(6):
        assert sorted(drawn[6 * epoch : 6 * epoch + 6]) == list(range(6))
    assert drawn[:6] != drawn[6:12]
    assert packing.batch_indices(6, 4, 5, generator) == drawn[20:24]


# --- Python's documentation


@pytest.fixture(scope="module")
def pairs():
    return python_docs.python_pairs()


def test_python_pairs(pairs):
    assert len(pairs) > 1500
    assert len({p.topic for p in pairs}) > 100
    assert len({" ".join(python_docs.words(p.answer)) for p in pairs}) == len(pairs)
    for p in pairs:
        assert len(python_docs.words(p.answer)) >= 4
        assert len(p.answer) <= python_docs.LONGEST_ANSWER
        assert p.name in p.question
        assert "``" not in p.answer + p.question
        assert ">>>" not in p.answer
    dumps = next(p for p in pairs if p.name.startswith("function `json.dumps("))
    assert dumps.answer == "Serialize `obj` to a JSON formatted `str`."
    assert python_docs.pairs_hash(pairs) == python_docs.pairs_hash(python_docs.python_pairs())


def test_held_out_means_held_out(pairs):
    train, held_out, unseen = python_docs.split_pairs(pairs)
    assert len(train) > 1000
    assert len(held_out) > 80
    assert len(unseen) > 80
    topics = {p.topic for p in train}
    assert not topics & {p.topic for p in unseen}
    text = " | ".join(" ".join(python_docs.words(p.answer)) for p in train)
    for p in held_out + unseen:
        found = python_docs.words(p.answer)
        for i in range(max(len(found) - 8, 0) + 1):
            assert f" {' '.join(found[i : i + 8])} " not in f" {text} "


def test_split_drops_what_shares_eight_words():
    answer = "one two three four five six seven eight nine ten"
    names = [f"n{i}" for i in range(200)]
    train, held_out, unseen = python_docs.split_pairs([Pair("json", name, "q", answer) for name in names])
    assert train
    assert not held_out + unseen
    different = [Pair("json", name, "q", answer.replace(" ", f" {name} ")) for name in names]
    train, held_out, unseen = python_docs.split_pairs(different)
    assert len(train) + len(held_out) == 200
    assert 5 < len(held_out) < 40
    assert not unseen
