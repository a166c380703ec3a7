"""The events of a stream, raw: pieces, then each answer's one finish reason, then usage, then [DONE]."""

import json

import httpx
import pytest
from small_server import serving, trained_tokenizer


@pytest.fixture(scope="module")
def served():
    tokenizer = trained_tokenizer()
    with serving(tokenizer) as (base, _):
        yield base, {str(tokenizer.eos_id): -100}


def said(choice):
    return choice["message"]["content"] if "message" in choice else choice["text"]


def texts_of(base, kind, body):
    return [said(choice) for choice in httpx.post(f"{base}/v1/{kind}", json=body, timeout=60).json()["choices"]]


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
@pytest.mark.parametrize("place", [None, 0, 3], ids=["length", "stop at once", "stop"])
def test_each_answer_ends_once_then_usage_then_done(served, kind, count, usage, place):
    base, bias = served
    given = {"prompt": "the quick"} if kind == "completions" else {"messages": [{"role": "user", "content": "fox"}]}
    body = {"model": "small", "max_tokens": 15, "n": count, "seed": 7, "temperature": 1.0, "logit_bias": bias, **given}
    if place is not None:  # a piece of each answer
        body["stop"] = [text[place : place + 2] for text in texts_of(base, kind, body)]
    asked = body | {"stream": True} | ({"stream_options": {"include_usage": True}} if usage else {})
    answer = httpx.post(f"{base}/v1/{kind}", json=asked, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\n")
    lines = answer.text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    events = [line.removeprefix("data: ") for line in lines]
    assert (events.count("[DONE]"), events[-1]) == (1, "[DONE]")
    chunks = [json.loads(event) for event in events[:-1]]
    whole = httpx.post(f"{base}/v1/{kind}", json=body, timeout=60).json()
    if usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert not any(chunk.get("usage") for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    for index in range(count):
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        reasons = [one["finish_reason"] for one in own]
        assert [reason for reason in reasons if reason] == reasons[-1:]  # once, and nothing after it
        wanted = whole["choices"][index]
        texts = [one["delta"].get("content", "") if "delta" in one else one["text"] for one in own]
        assert "".join(texts) == said(wanted)
        assert reasons[-1] == wanted["finish_reason"] == ("length" if place is None else "stop")
        assert said(wanted) == "" or place != 0
        if "delta" in own[0]:
            assert own[0]["delta"]["role"] == "assistant"
