"""Calls of tools: read out of texts however these are cut, in the form that the template has, served to OpenAI's own
client; structured answers next to them."""

import contextlib
import json
import random

import pytest
import torch
from published_templates import LLAMA31, MISTRAL, PHI3, QWEN3
from small_served import llama
from small_server import serving

from finetune.errors import UserError
from finetune.inference import grammar, tools
from finetune.inference.text import TextStream
from finetune.lm.chat_template import TEMPLATES
from finetune.lm.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "tells the weather of a town",
        "parameters": {
            "type": "object", "required": ["town"], "additionalProperties": False,
            "properties": {"town": {"enum": ["Ulm", "Köln"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock", "description": "tells the time"}}
ONE = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'
QUOTED = '<tool_call>{"name": "weather", "arguments": {"town": "</tool_call> <tool_call>"}}</tool_call>'
NAMELESS, UNKNOWN = '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"name": "x", "arguments": {}}</tool_call>'
LISTED = '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'
LLAMA = '{"name": "weather", "parameters": {"town": "Ulm"}}'
HERMES = {
    "plain": ("a < b <tool", "a < b <tool", []),
    "one": (ONE, "", [{"town": "Ulm"}]),
    "behind a text": (f"I look. \n{ONE}\n", "I look.", [{"town": "Ulm"}]),
    "two, and a text": (f"a\n{ONE}\n{ONE} b ", "a b ", [{"town": "Ulm"}] * 2),
    "a marker in a text": (QUOTED, "", [{"town": "</tool_call> <tool_call>"}]),
    "broken": ("x <tool_call>{town}</tool_call> y", "x <tool_call>{town}</tool_call> y", []),
    "broken, then one": (f" {NAMELESS}{ONE}", f" {NAMELESS}", [{"town": "Ulm"}]),
    "of no tool": (UNKNOWN, UNKNOWN, []),
    "without an object": (LISTED, LISTED, []),
    "cut": (ONE[:-3], ONE[:-3], []),
    "deep": (f"<tool_call>{'[' * 9999}</tool_call>", f"<tool_call>{'[' * 9999}</tool_call>", []),
}
LLAMAS = {
    "plain": ("say {}", "say {}", []),
    "one": (LLAMA, "", [{"town": "Ulm"}]),
    "marked": (f"<|python_tag|>{LLAMA}\n", "", [{"town": "Ulm"}]),
    "two": (f"{LLAMA}; {LLAMA}", "", [{"town": "Ulm"}] * 2),
    "and a text": (f"{LLAMA} so", f"{LLAMA} so", []),
    "behind a text": (f"so {LLAMA}", f"so {LLAMA}", []),
    "of another form": (LLAMA.replace("parameters", "arguments"), LLAMA.replace("parameters", "arguments"), []),
    "cut": (LLAMA[:-1], LLAMA[:-1], []),
}
CASES = [(tools.Hermes, *case) for case in HERMES.values()] + [(tools.Llama, *case) for case in LLAMAS.values()]


@pytest.mark.parametrize(("form", "text", "said", "arguments"), CASES, ids=[*HERMES, *(f"llama {n}" for n in LLAMAS)])
def test_calls_are_read_whatever_the_pieces(form, text, said, arguments):
    rng = random.Random(0)
    for pieces in (1, 2, 3, 10, 50, len(text)):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(pieces - 1))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        parts = [*text] if pieces == len(text) < 200 else parts
        reader = form({"weather", "clock"})
        found = [reader.push(part) for part in parts] + [reader.finish()]
        assert "".join(words for words, _ in found) == said
        assert [call.arguments for _, calls in found for call in calls] == arguments


def test_text_before_a_call_is_not_held_back():
    reader = tools.Hermes({"weather"})
    assert [reader.push(part)[0] for part in ("I ", "look", " <", "b", " <tool_call>{")] == [
        "I",
        " look",
        "",
        " <b",
        "",
    ]
    assert tools.Llama({"weather"}).push("so {")[0] == "so {"


def trained(template, *special):
    texts = ["weather town Ulm Köln <tool_call> </tool_call> name arguments parameters"]
    tokenizer = Tokenizer.train(texts * 3, vocab_size=300)
    tokenizer.backend.add_special_tokens([*special, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"])
    tokenizer.chat_template = template
    return tokenizer


HERMES_TEMPLATE = TEMPLATES["chatml-tools"].source
THINKING = HERMES_TEMPLATE.replace("{{ content }}", "{{ '<think>\n\n</think>\n\n' + content }}")
MODELS = {
    "hermes": (HERMES_TEMPLATE, ()), "llama": (LLAMA31, ()),
    "special": (HERMES_TEMPLATE, ("<tool_call>", "</tool_call>")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "form"), [(HERMES_TEMPLATE, tools.Hermes), (THINKING, tools.Hermes), (LLAMA31, tools.Llama)]
)
def test_the_template_tells_the_form(template, form):
    assert tools.form_of(trained(template)) is form


@pytest.mark.parametrize(
    ("template", "what"),
    [(TEMPLATES["chatml"].source, "does not write tools"), (PHI3, "does not write tools"), (QWEN3, "not known here"),
     (MISTRAL, "length 9")],
)  # fmt: skip
def test_a_template_without_tools_or_of_another_form_is_refused(template, what):
    with pytest.raises(UserError, match=what):
        tools.form_of(trained(template))


@contextlib.contextmanager
def asking(name, script=None):
    """(OpenAI's client, server, tokenizer) of a model that writes `script`, or what it likes."""
    import openai

    template, special = MODELS[name]
    tokenizer = trained(template, *special)
    model = llama(vocab_size=tokenizer.vocab_size, max_length=2048)
    with serving(tokenizer, blocks=600, model=model) as (base, server):
        if script is not None:
            tokens = [*tokenizer.encode(script, False), tokenizer.eos_id]

            def answers(_, plan, asked, *_others):
                return [
                    None if what == "nothing" else written(work, what) for work, what in zip(plan, asked, strict=True)
                ]

            def written(work, what):
                token = tokens[len(work.sequence.answer)]
                row = torch.zeros(1, tokenizer.vocab_size)
                row[0, token] = 1000.0
                return [token] if what == "tokens" else row

            server.worker.engine.cache.answers = answers
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
            yield client, server, tokenizer


def streamed(client, **given):
    """A streamed answer put together: (content, [(id, name, arguments)], finish reason)."""
    content, calls, reasons = "", {}, []
    for chunk in client.chat.completions.create(**given, stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            old = calls.get(call.index, ("", "", ""))
            new = (call.id or "", call.function.name or "", call.function.arguments or "")
            calls[call.index] = tuple(a + b for a, b in zip(old, new, strict=True))
        reasons += [choice.finish_reason] if choice.finish_reason else []
    (reason,) = reasons
    return content, list(calls.values()), reason


ASK = {"model": "small", "messages": [{"role": "user", "content": "weather in Ulm?"}], "max_tokens": 300}
TWO = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
SCRIPTS = [
    ("hermes", f"I look.\n{ONE}\n{TWO}", "I look.", ["weather", "clock"]),
    ("special", f"{ONE}\n{TWO}", None, ["weather", "clock"]),
    ("llama", LLAMA, None, ["weather"]),
    ("hermes", f"no{UNKNOWN} 🙂", f"no{UNKNOWN} 🙂", []),
    ("special", f"no{UNKNOWN} 🙂", f"no{UNKNOWN} 🙂", []),
    ("llama", '{"a": 1}', '{"a": 1}', []),
]


@pytest.mark.peer
@pytest.mark.parametrize(("name", "script", "said", "called"), SCRIPTS)
def test_openais_client_gets_calls_and_sends_results(name, script, said, called):
    with asking(name, script) as (client, _, tokenizer):
        given = ASK | {"tools": [WEATHER, CLOCK], "temperature": 0}
        (whole,) = client.chat.completions.create(**given).choices
        calls = whole.message.tool_calls or []
        assert whole.message.content == said
        assert [call.function.name for call in calls] == called
        assert whole.finish_reason == ("tool_calls" if called else "stop")
        content, pieces, reason = streamed(client, **given)
        assert (content, reason) == (said or "", whole.finish_reason)
        assert [piece[1:] for piece in pieces] == [(c.function.name, c.function.arguments) for c in calls]
        assert len({piece[0] for piece in pieces} | {call.id for call in calls}) == 2 * len(calls)
        # without tools, or when none may be called, it is all text
        shown = script if name != "special" else script.replace("<tool_call>", "").replace("</tool_call>", "")
        for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            (plain,) = client.chat.completions.create(**ASK, **more, temperature=0).choices
            assert (plain.message.content, plain.message.tool_calls, plain.finish_reason) == (shown, None, "stop")
        if not called:
            return
        assert json.loads(calls[0].function.arguments) == {"town": "Ulm"}
        (first,) = client.chat.completions.create(**given, parallel_tool_calls=False).choices
        assert [call.function.name for call in first.message.tool_calls] == called[:1]
        # the results go back, as the client has the messages
        results = [{"role": "tool", "tool_call_id": call.id, "content": f"18 °C {i}"} for i, call in enumerate(calls)]
        after = client.chat.completions.create(**given | {"messages": [*ASK["messages"], whole.message, *results]})
        turn = {"role": "assistant"} | ({"content": said} if said else {}) | {"tool_calls": [
            {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": json.loads(arguments)}}
            for c in calls for arguments in [c.function.arguments]
        ]}  # fmt: skip
        messages = [ASK["messages"][0] | {"tools": given["tools"]}, turn, *results]
        text, _ = tokenizer.render_text(messages, add_generation_prompt=True)
        assert '"town": "Ulm"' in text
        assert "18 °C 0" in text
        assert after.usage.prompt_tokens == len(tokenizer.encode(text, False))


@pytest.mark.peer
@pytest.mark.parametrize("name", MODELS)
def test_a_call_is_forced(name):
    """On a model with random weights, at a high temperature."""
    pytest.importorskip("llguidance")
    with asking(name) as (client, _, _tokenizer):
        given = ASK | {"tools": [WEATHER, CLOCK], "temperature": 1.5}
        names = set()
        for seed in range(6):
            (found,) = client.chat.completions.create(**given, tool_choice="required", seed=seed, n=1).choices
            if found.finish_reason == "length":  # of random calls there may be many
                continue
            assert (found.finish_reason, found.message.content) == ("tool_calls", None)
            for call in found.message.tool_calls:
                names.add(call.function.name)
                check(call.function)
        assert names == {"weather", "clock"}
        named = {"type": "function", "function": {"name": "weather"}}
        choices = client.chat.completions.create(
            **given, tool_choice=named, parallel_tool_calls=False, seed=1, n=3
        ).choices
        for one in choices:
            (call,) = one.message.tool_calls
            assert call.function.name == "weather"
            check(call.function)
        content, (call,), reason = streamed(client, **given, tool_choice=named, parallel_tool_calls=False, seed=1)
        assert (content, reason) == ("", "tool_calls")
        assert call[2] == choices[0].message.tool_calls[0].function.arguments
        # a free answer of a model with strict tools is a text or a call
        strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
        (free,) = client.chat.completions.create(**given | {"tools": [strict], "max_tokens": 30}, seed=1).choices
        assert free.finish_reason in ("stop", "length", "tool_calls")
        # cut by length it is not a call, and the answer says so
        (cut,) = client.chat.completions.create(**given | {"max_tokens": 4}, tool_choice=named).choices
        assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)
        # a schema of the answer, next to tools that may be called
        schema = {"type": "object", "properties": {"ab": {"type": "boolean"}}, "required": ["ab"]}
        schema = {"name": "n", "schema": schema | {"additionalProperties": False}}
        both = {"response_format": {"type": "json_schema", "json_schema": schema}, "parallel_tool_calls": False}
        said, made = 0, 0
        for seed in range(12):
            (one,) = client.chat.completions.create(**given, **both, seed=seed).choices
            made += bool(one.message.tool_calls)
            if not one.message.tool_calls:
                said += set(json.loads(one.message.content)) == {"ab"}
        assert said + made == 12
        assert said


@pytest.mark.parametrize("name", MODELS)
def test_strict_tools_bind_the_calls_of_a_free_answer(name):
    """Texts stay free; what begins as a call can only become a well-formed one."""
    pytest.importorskip("llguidance")
    template, special = MODELS[name]
    tokenizer = trained(template, *special)
    dialect = tools.Dialect.of(tokenizer)
    words = grammar.Vocabulary(tokenizer, tokenizer.vocab_size, {tokenizer.eos_id})
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    one = LLAMA if name == "llama" else ONE
    wrong, other = one.replace("Ulm", "Rom"), one.replace("weather", "clock")
    for many in (True, False):
        source = "start: calls\n" + dialect.rules([strict, CLOCK], many, free=True)
        behind = name != "llama"
        for text, fits in (
            ("", True), ("so < <b {", True), (one, True), (other, True), (wrong, False), (one[:-1], False),
            (f"I look. {one}", True), (f"{one}\n so", many and behind), (f"{one}\n{one}", many and behind),
        ):  # fmt: skip
            ids, matcher = [*tokenizer.encode(text, False), tokenizer.eos_id], words.matcher(source)
            assert all(bool(matcher.allowed(ids[:i])[ids[i]]) for i in range(len(ids))) == fits, (text, many)


def check(function):
    arguments = json.loads(function.arguments)
    if function.name == "clock":
        assert arguments == {}
    else:
        assert arguments["town"] in ("Ulm", "Köln")
        assert 1 <= arguments.get("days", 1) <= 9


@pytest.mark.peer
def test_openais_client_gets_structured_answers():
    pytest.importorskip("llguidance")
    import pydantic

    class Town(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=4)
        rivers: int = pydantic.Field(ge=0, le=9)

    with asking("hermes") as (client, _, _tokenizer):
        given = ASK | {"temperature": 1.0}
        for seed in range(3):
            (found,) = client.chat.completions.parse(**given, response_format=Town, seed=seed).choices
            assert 0 <= found.message.parsed.rivers <= 9
        anything = client.chat.completions.create(**given, response_format={"type": "json_object"}, seed=4, n=4)
        for one in anything.choices:
            if one.finish_reason == "stop":
                assert isinstance(json.loads(one.message.content), dict)
        for extra, texts in (
            ({"guided_choice": ["Ulm", "Köln"]}, {"Ulm", "Köln"}),
            ({"structured_outputs": {"choice": ["Ulm", "Köln"]}}, {"Ulm", "Köln"}),
            ({"guided_regex": "U{1,3}l?m"}, {"U" * i + el + "m" for i in (1, 2, 3) for el in ("", "l")}),
            ({"structured_outputs": {"regex": "Ulm|Köln"}}, {"Ulm", "Köln"}),
            ({"guided_json": '{"enum": ["Ulm"]}'}, {'"Ulm"'}), ({"structured_outputs": {"json": {"const": 5}}}, {"5"}),
        ):  # fmt: skip
            answers = client.chat.completions.create(**given, extra_body=extra, seed=7, n=3).choices
            assert {one.message.content for one in answers} <= texts
            assert {one.finish_reason for one in answers} == {"stop"}
            done = client.completions.create(model="small", prompt="weather", max_tokens=30, seed=1, extra_body=extra)
            assert done.choices[0].text in texts
        cut = client.chat.completions.create(**given | {"max_tokens": 2}, response_format={"type": "json_object"})
        assert cut.choices[0].finish_reason in ("length", "stop")
        assert cut.choices[0].finish_reason == "length" or cut.choices[0].message.content == "{}"


WRONG = [
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "clock"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tool_choice": "any", "tools": [WEATHER]}, "tool_choice"),
    ({"tools": [WEATHER, WEATHER]}, "twice"), ({"tools": [{"type": "function"}]}, "function"),
    ({"tools": [{"type": "web_search"}]}, "tools"), ({"functions": [CLOCK["function"]]}, "functions"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, "not"),
    ({"guided_grammar": "start: x"}, "guided_grammar"), ({"structured_outputs": {"grammar": "x"}}, "grammar"),
    ({"guided_json": "{"}, "guided_json"), ({"guided_regex": "(?=a)"}, "look-around"),
    ({"guided_choice": []}, "choice"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "both"),
    ({"tools": [WEATHER], "guided_choice": ["a"]}, "exclude"),
    ({"tools": [WEATHER], "tool_choice": "required", "guided_json": {}}, "exclude"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
    ({"messages": [*ASK["messages"], {"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "tool_calls"),
]  # fmt: skip


@pytest.fixture(scope="module")
def served():
    tokenizer = trained(HERMES_TEMPLATE)
    with serving(tokenizer, model=llama(vocab_size=tokenizer.vocab_size, max_length=1024), blocks=300) as found:
        yield found


@pytest.mark.parametrize(("given", "what"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_requests_get_the_apis_error_object(served, given, what):
    import httpx

    pytest.importorskip("llguidance")
    base, server = served
    answer = httpx.post(f"{base}/v1/chat/completions", json=ASK | given, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert what in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert server.active == 0


def test_without_the_library_forced_calls_are_refused_by_name(served, monkeypatch):
    import httpx

    base, server = served
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    server.__dict__.pop("vocabulary", None)
    for given in ({"tools": [CLOCK], "tool_choice": "required"}, {"response_format": {"type": "json_object"}}):
        answer = httpx.post(f"{base}/v1/chat/completions", json=ASK | given, timeout=60)
        assert (answer.status_code, "finetune-lab[grammar]" in answer.json()["error"]["message"]) == (400, True)
    answer = httpx.post(f"{base}/v1/chat/completions", json=ASK | {"tools": [CLOCK], "max_tokens": 3}, timeout=60)
    assert answer.status_code == 200


def test_content_may_be_a_list_of_texts_and_a_developer_is_the_system(served):
    import httpx

    base, _ = served
    given = {"temperature": 0, "max_tokens": 5}
    parts = [{"type": "text", "text": "weather "}, {"type": "text", "text": "in Ulm?"}]
    for one, other in (
        (ASK["messages"], [{"role": "user", "content": parts}]),
        (
            [{"role": "system", "content": "s"}, *ASK["messages"]],
            [{"role": "developer", "content": "s"}, *ASK["messages"]],
        ),
    ):
        answers = [
            httpx.post(f"{base}/v1/chat/completions", json=ASK | given | {"messages": messages}, timeout=60).json()
            for messages in (one, other)
        ]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


def test_special_tokens_that_are_kept_are_written():
    tokenizer = trained(HERMES_TEMPLATE, "<tool_call>")
    ids = tokenizer.encode("a<tool_call>b<|eot_id|>é🙂", False)
    for keep, wanted in (((), "abé🙂"), ([tokenizer.backend.token_to_id("<tool_call>")], "a<tool_call>bé🙂")):
        stream = TextStream(tokenizer, keep=keep)
        assert "".join(map(stream.push, ids)) + stream.finish() == wanted
