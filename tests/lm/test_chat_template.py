"""Chat templates: which tokens are learned, what is refused rather than omitted, and that none can hang."""

import json
import re

import pytest
from tokenizers import Tokenizer as Backend

from finetune.errors import UserError
from finetune.lm import chat_template
from finetune.lm.chat_template import ChatTemplate, chatml
from finetune.lm.io import save
from finetune.lm.sandbox import unmarked
from finetune.lm.tokenizer import Tokenizer

TURN = (
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# After Qwen 2.5's and 3's: tools and calls as JSON, reasoning before the answer, earlier reasoning omitted.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson(indent=1) }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.reasoning_content is defined and loop.index0 == ns.last %}"
    "{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}{{- m.content }}"
    "{%- if m.tool_calls %}{%- for call in m.tool_calls %}{%- set call = call.function or call %}"
    "{{- '<tool_call>' + call.name + (call.arguments | tojson) + '</tool_call>' }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if documents %}{%- for d in documents %}{{- d.title }}{%- endfor %}{%- endif %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no  "},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm", "days": 2}}}
USER = {"role": "user", "content": "rain?"}


@pytest.fixture(scope="module")
def backend():
    tokenizer = Tokenizer.train([LOOP * 3, json.dumps(CALL) * 3], 400).backend
    tokenizer.add_special_tokens(["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin|>"])
    return tokenizer.to_str()


def using(backend, source):
    return Tokenizer(Backend.from_str(backend), bos="<|begin|>", eos="<|im_end|>", pad="<|endoftext|>",
                     chat_template=source, others={"unk_token": "<|endoftext|>"})  # fmt: skip


def learned(tokenizer, chat):
    ids, mask = tokenizer.render(chat)
    return tokenizer.decode([i for i, kept in zip(ids, mask, strict=True) if kept])


# --- Markers


@pytest.mark.parametrize(
    "source",
    [
        LOOP,
        LOOP.replace("{% generation %}", "{%- generation -%}").replace("{% endgeneration %}", "{%-endgeneration-%}"),
        LOOP.replace("{% generation %}", "{%generation%}").replace("{% endgeneration %}", "{%\n endgeneration\n%}"),
        "{% macro turn(m) %}" + TURN + "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}" + PROMPT,
        "{% for m in messages %}{% set text %}" + TURN + "{% endset %}{{ text }}{% endfor %}" + PROMPT,
        "{% set all %}{% for m in messages %}" + TURN + "{% endfor %}{% endset %}{{ all }}" + PROMPT,
        "{% for m in messages %}{% filter trim %}" + TURN + "{% endfilter %}{{ '\n' }}{% endfor %}" + PROMPT,
        "{% macro box() %}[{{ caller() }}]{% endmacro %}{% for m in messages %}{% call box() %}" + TURN
        + "{% endcall %}{% endfor %}" + PROMPT,
        LOOP.replace("{% generation %}", "").replace("{% endgeneration %}", ""),  # told by the difference
        LOOP.replace("{% generation %}", "{% raw %}{% generation %}{% endraw %}").replace("{% endgeneration %}", "")
        .replace("{% raw %}{% generation %}{% endraw %}", ""),
    ],
)  # fmt: skip
def test_the_answers_and_their_ends_are_learned(backend, source):
    tokenizer = using(backend, source)
    assert learned(tokenizer, CHAT) == "yes<|im_end|>no  <|im_end|>"
    plain = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert tokenizer.render_text(CHAT)[0] == using(backend, plain).render_text(CHAT)[0]


@pytest.mark.parametrize("spelled", ["{%generation%}", "{%-  generation-%}", "{%+ generation %}", "{%\tgeneration\n%}"])
def test_markers_are_found_however_they_are_spaced(spelled):
    assert ChatTemplate(f"{spelled}x{{% endgeneration %}}").marked
    assert not ChatTemplate("{% raw %}" + spelled + "x{% endgeneration %}{% endraw %}{# {% generation %} #}").marked
    assert not ChatTemplate("{{ '{% generation %}' }}").marked


@pytest.mark.parametrize(
    "wrap",
    [
        "{% for m in messages %}{% filter truncate(9, true, '') %}{}{% endfilter %}{% endfor %}",
        "{% set t %}{% for m in messages %}{}{% endfor %}{% endset %}{{ t | length }}",
        "{% set t %}{% for m in messages %}{}{% endfor %}{% endset %}{{ t | reverse }}",
        "{% set t %}{% for m in messages %}{}{% endfor %}{% endset %}{{ t[10:] }}{{ t | tojson(ensure_ascii=true) }}",
        "{% set t %}{% for m in messages %}{}{% endfor %}{% endset %}{{ t | list | unique | join }}",
    ],
)
def test_text_that_is_computed_with_is_refused(backend, wrap):
    with pytest.raises(UserError, match=r"computes with the text between its|does not write message 0") as caught:
        learned(using(backend, wrap.replace("{}", TURN)), CHAT)
    assert "\n" not in str(caught.value)


def test_markers_around_nothing_are_refused(backend):
    empty = LOOP.replace("{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
                         "{% generation %}{% endgeneration %}{{ m['content'] }}")  # fmt: skip
    with pytest.raises(UserError, match="nothing of the answers stands between"):
        using(backend, empty).render(CHAT)


def test_an_answer_without_markers_among_others_is_refused(backend):
    some = LOOP.replace("== 'assistant' %}{% generation", "== 'assistant' and loop.last %}{% generation")
    assert learned(using(backend, some), CHAT[:3]) == "yes<|im_end|>"
    with pytest.raises(UserError, match="1 of 2 of the answers stands between"):
        using(backend, some).render(CHAT)


def test_marks_are_pairs_or_nothing():
    assert unmarked("a(b)c((d)e)()", ("(", ")")) == ("abcde", [(1, 2), (3, 5)])
    for broken in ("a)b(", "(a", "a)"):
        assert unmarked(broken, ("(", ")")) is None


# --- Without markers


def test_llama3_is_told_by_the_difference(backend):
    assert learned(using(backend, LLAMA3), CHAT) == "yes<|eot_id|>no<|eot_id|>"


def test_reasoning_and_tools_are_learned_where_the_template_writes_them(backend):
    tokenizer = using(backend, QWEN)
    row = [USER, {"role": "assistant", "reasoning_content": "clouds", "content": "rain"}]
    assert learned(tokenizer, row) == "<think>clouds</think>rain<|im_end|>"
    row = [USER | {"tools": [CALL["function"]]}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
           {"role": "tool", "content": "12 mm"}, {"role": "assistant", "content": "yes"}]  # fmt: skip
    text = tokenizer.render_text(row)[0]
    assert '"town": "Ulm"' in text.split("# Tools")[1]
    assert learned(tokenizer, row) == '<tool_call>weather{"town": "Ulm", "days": 2}</tool_call><|im_end|>yes<|im_end|>'


def learned_texts(tokenizer, chat):
    """(whole text, learned text) of every text in which answers of the chat are learned."""
    assert tokenizer.renderer.losses(chat) == []
    found = []
    for ids, mask, _ in tokenizer.documents(chat):
        kept = [i for i, learned in zip(ids, mask, strict=True) if learned]
        found.append((tokenizer.decode(ids), tokenizer.decode(kept)))
    return found


def test_an_answer_that_is_written_otherwise_later_is_learned_by_itself(backend):
    tokenizer = using(backend, QWEN)
    row = [USER, {"role": "assistant", "thinking": "clouds", "content": "rain"}, USER, CHAT[2]]
    first, last = sorted(learned_texts(tokenizer, row), key=lambda pair: len(pair[0]))
    assert first[0] == "<|im_start|>user\nrain?<|im_end|>\n<|im_start|>assistant\n<think>clouds</think>rain<|im_end|>\n"
    assert first[1] == "<think>clouds</think>rain<|im_end|>"
    assert last[1] == "yes<|im_end|>"
    assert "<think>" not in last[0]
    with pytest.raises(UserError, match="render each by itself"):
        tokenizer.render(row)
    last = "{% if loop.last and m.role == 'assistant' %}</s>{% endif %}"
    closing = using(backend, "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + last + "{% endfor %}"
                    + "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    assert sorted(text for _, text in learned_texts(closing, CHAT)) == ["no  </s>", "yes</s>"]


def test_an_answer_that_its_prompt_does_not_begin_is_refused(backend):
    thinking = using(backend, QWEN.replace("assistant\\n", "assistant\\n<think>"))
    with pytest.raises(UserError, match="asks for an answer with '<think>', but writes 'yes"):
        thinking.render(CHAT[1:3])


@pytest.mark.parametrize("source", [LOOP, LLAMA3, QWEN])
def test_a_message_of_weight_0_is_not_learned(backend, source):
    end = "<|eot_id|>" if source is LLAMA3 else "<|im_end|>"
    chat = [USER, {"role": "assistant", "content": "draft", "weight": 0}, USER,
            {"role": "assistant", "content": "rain", "weight": 1}]  # fmt: skip
    assert learned(using(backend, source), chat) == f"rain{end}"


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ([USER, {"role": "assistant", "content": "look", "tool_calls": [CALL]}], "'tool_calls' of message 1"),
        ([USER, {"role": "assistant", "content": "a", "reasoning_content": "b"}], "'reasoning_content' of message 1"),
        ([USER | {"tools": [CALL["function"]]}, CHAT[2]], "the row's 'tools'"),
        ([USER | {"documents": [{"title": "a"}]}, CHAT[2]], "the row's 'documents'"),
    ],
)
def test_what_the_template_omits_is_refused(backend, row, match):
    with pytest.raises(UserError, match=match):
        using(backend, LOOP).render(row)


def test_roles_that_the_template_omits_are_refused_and_other_keys_named(backend):
    deaf = using(backend, LOOP.replace("messages %}", "messages if m.role in ('user', 'assistant') %}"))
    with pytest.raises(UserError, match="message 0, whose role is 'system'"):
        deaf.render(CHAT)
    assert deaf.render(CHAT[1:])
    tokenizer = using(backend, LOOP)
    tokenizer.render([USER | {"name": "x", "id": None}, CHAT[2] | {"id": 3}])
    assert tokenizer.renderer.unwritten == {"name", "id"}


NAMES = (
    "{{ tools is defined }}{{ documents is none }}{{ unk_token }}{{ sep_token }}{{ bos_token }}"
    "{{ messages[0].reasoning_content }}{{ messages | length }}"
)


@pytest.mark.peer
@pytest.mark.parametrize("source", [chatml(), chatml("sys"), LLAMA3, QWEN, NAMES])
def test_renders_as_transformers(tmp_path, backend, source):
    from transformers import AutoTokenizer

    tokenizer = using(backend, source)
    save.tokenizer(tokenizer, tmp_path)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    tools, documents = [{"type": "function", "function": CALL["function"]}], [{"title": "t", "text": "x"}]
    chats = [
        CHAT,
        CHAT[1:2],
        [USER, {"role": "assistant", "thinking": "<b>", "content": "'ü&"}],
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "{}"}],
        [USER | {"name": "n", "weight": 1}, CHAT[2]],
    ]
    for chat in chats:
        for given in ({}, {"tools": tools}, {"tools": tools, "documents": documents}):
            for prompt in (False, True):
                theirs = peer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False, **given)
                ours = tokenizer.render_text([chat[0] | given, *chat[1:]], prompt)[0]
                assert ours == theirs


# --- A template that does not end, or asks for all memory, is one line


HARMFUL = [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than"),
    ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than 16,777,216 characters"),
    ("{{ 'a' * 10 ** 10 }}", "too much memory"),
    ("{{ ('a' * messages | length) * 10 ** 10 }}", "too much memory"),
    ("{{ '%0999999999d' | format(messages | length) }}", "too much memory|longer than|more than"),
    ("{{ [messages] * 10 ** 9 }}", "too much memory"),
    ("{{ [1] | tojson(indent=10 ** 10) }}", "too much memory|OverflowError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    ("{% set x = 3 ** messages | length * 9 ** 9999999 %}", "longer than|too much memory"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ messages[0].update({}) }}", "unsafe"),
    ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{{ namespace(__class__=1) }}", "cannot hold the name"),
    ("{{ lipsum() }}", "undefined"),
    ("{{ messages | tojson(default=cycler) }}", "unexpected keyword argument 'default'"),
    ("{{ messages | tojson(cls=cycler) }}", "unexpected keyword argument 'cls'"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ none + 1 }}", "TypeError"),
    ("{% include 'x' %}", "no loader"),
    ("{{ raise_exception('a\nb' * 9999) }}", "a b"),
    ("{{ raise_exception() }}", "missing"),
    ("{% for %}", "does not compile"),
    ("{% if 1 %}" * 3000, "does not compile: it is nested too deeply"),
    ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "does not compile: it is nested too deeply"),
    ("x" * ((1 << 20) + 1), "1,048,577 characters"),
]


@pytest.mark.parametrize(("source", "match"), HARMFUL)
def test_harmful_templates_are_one_line(monkeypatch, source, match):
    monkeypatch.setattr(chat_template, "SECONDS", 0.7)
    chat_template.worker.stop()
    with pytest.raises(UserError) as caught:
        ChatTemplate(source).render(messages=[USER])
    assert re.search(match, str(caught.value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    chat_template.worker.stop()


def test_the_next_template_is_answered_after_one_that_was_ended(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    chat_template.worker.stop()
    good = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(UserError, match="longer than"):
        ChatTemplate(HARMFUL[0][0]).render(messages=[USER])
    assert good.render(messages=[USER])[0] == "rain?"
    process = chat_template.worker.process
    assert good.render(messages=[CHAT[0]])[0] == "be brief"
    assert chat_template.worker.process is process  # one process for all of them
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="ends the process"):
        good.render(messages=[USER])
    assert good.render(messages=[USER])[0] == "rain?"
    chat_template.worker.stop()


def test_an_interrupted_request_leaves_no_answer_for_the_next(monkeypatch):
    good = ChatTemplate("{{ messages[0].content }}")

    class Interrupted:
        def __init__(self, pipe):
            self.pipe = pipe

        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            self.pipe.close()

    monkeypatch.setattr(chat_template.worker.process, "stdout", Interrupted(chat_template.worker.process.stdout))
    with pytest.raises(KeyboardInterrupt):
        good.render(messages=[USER])
    assert good.render(messages=[CHAT[1]])[0] == "hello"
