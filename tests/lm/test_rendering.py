"""What is learned under the templates of others: whose characters are whose, in which texts, and what is lost."""

import json
from pathlib import Path

import pytest
from published_templates import DEEPSEEK, GEMMA, LLAMA31, MISTRAL, PHI3, QWEN3, ZEPHYR
from tokenizers import Tokenizer as Backend

from finetune.errors import UserError
from finetune.lm.chat_template import TEMPLATES, ChatTemplate
from finetune.lm.rendering import Renderer, named
from finetune.lm.tokenizer import Tokenizer

USER, AGAIN = {"role": "user", "content": "q1"}, {"role": "user", "content": "q2"}
FIRST, SECOND = {"role": "assistant", "content": "a1"}, {"role": "assistant", "content": "a2"}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"town": "Ulm", "days": 2}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
CHATS = {
    "plain": [USER, FIRST, AGAIN, SECOND],
    "system": [SYSTEM, USER, FIRST, AGAIN, SECOND],
    "thinking": [USER, FIRST | {"reasoning_content": "r1"}, AGAIN, SECOND | {"reasoning_content": "r2"}],
    "tools": [USER | {"tools": [TOOL]}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
              {"role": "tool", "content": "12", "name": "weather", "tool_call_id": "abcdefghi"}, SECOND],
    "tools twice": [USER | {"tools": [TOOL]}, FIRST, AGAIN, SECOND],
}  # fmt: skip
ENDS = ("</s>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<｜end｜>", "</tool_call>")
THINK = "<think>\n\n</think>\n\n"
LEARNED = [  # template, chat, the learned parts of every text
    (LLAMA31, "plain", [["a1<|eot_id|>", "a2<|eot_id|>"]]),
    (LLAMA31, "system", [["a1<|eot_id|>", "a2<|eot_id|>"]]),
    (LLAMA31, "tools",
     [['{"name": "weather", "parameters": {"town": "Ulm", "days": 2}}<|eot_id|>', "a2<|eot_id|>"]]),
    (LLAMA31, "tools twice", [["a1<|eot_id|>", "a2<|eot_id|>"]]),
    (QWEN3, "plain", [[f"{THINK}a1<|im_end|>"], [f"{THINK}a2<|im_end|>"]]),
    (QWEN3, "thinking", [["<think>\nr1\n</think>\n\na1<|im_end|>"], ["<think>\nr2\n</think>\n\na2<|im_end|>"]]),
    (QWEN3, "tools", [[THINK + '<tool_call>weather{"town": "Ulm", "days": 2}</tool_call><|im_end|>'],
                      [f"{THINK}a2<|im_end|>"]]),
    (MISTRAL, "plain", [[" a1</s>", " a2</s>"]]),
    (MISTRAL, "tools",
     [['[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Ulm", "days": 2}}]</s>', " a2</s>"]]),
    (MISTRAL, "tools twice", [[" a1</s>"], [" a2</s>"]]),
    (GEMMA, "plain", [["a1<end_of_turn>", "a2<end_of_turn>"]]),
    (GEMMA, "system", [["a1<end_of_turn>", "a2<end_of_turn>"]]),
    (ZEPHYR, "system", [["a1</s>", "a2</s>"]]),
    (PHI3, "system", [["a1<|end|>", "a2<|end|>"]]),
    (DEEPSEEK, "plain", [["a1<｜end｜>", "a2<｜end｜>"]]),
]  # fmt: skip


def renderer(source, eos="</s>"):
    return Renderer(ChatTemplate(source), {"bos_token": "<s>", "eos_token": eos}, ENDS)


@pytest.mark.parametrize(("source", "chat", "wanted"), LEARNED)
def test_what_is_learned(source, chat, wanted):
    eos = "<|endoftext|>" if source is PHI3 else "</s>"
    parts = renderer(source, eos).documents(CHATS[chat])
    assert [[part.text[a:b] for a, b in part.spans] for part in parts] == wanted
    assert renderer(source, eos).losses(CHATS[chat]) == []


def test_each_text_is_what_the_model_sees_when_it_answers():
    """Qwen 3: the first answer is learned with its reasoning, the second after the first one without it."""
    first, second = renderer(QWEN3).documents(CHATS["thinking"])
    assert (first.messages, second.messages) == (2, 4)
    assert first.text.startswith("<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\nr1")
    assert "r1" not in second.text
    assert "q2" not in first.text
    for part, count in ((first, 1), (second, 3)):
        prompt = renderer(QWEN3).text(CHATS["thinking"][:count], prompt=True)[0]
        ((start, _),) = part.spans
        assert part.text[:start] == prompt


def test_arguments_are_text_where_the_template_adds_them_to_one():
    chat = CHATS["tools"][0].copy(), *CHATS["tools"][1:]
    chat[0].pop("tools")
    (part,) = renderer(DEEPSEEK).documents(chat)
    wanted = ['weather\n{"town": "Ulm", "days": 2}<｜end｜>', "a2<｜end｜>"]
    start = part.text.index("weather")
    assert part.text[start:].startswith(wanted[0])
    printed = DEEPSEEK.replace("'\n' + c.function.arguments", "'\n' ~ c.function.arguments")  # else as Python prints it
    assert renderer(printed).documents(chat)[0].text == part.text


def test_what_a_template_loses_is_named():
    found = {name: [kind for kind, _ in renderer(PHI3, "<|endoftext|>").losses(chat)] for name, chat in CHATS.items()}
    assert found == {
        "plain": [],
        "system": [],
        "thinking": ["'reasoning_content'"] * 2,
        "tools": ["the row's 'tools'", "'tool_calls'"],
        "tools twice": ["the row's 'tools'"],
    }
    with pytest.raises(UserError, match="roles must alternate"):
        renderer(GEMMA).losses(CHATS["tools"])
    with pytest.raises(UserError, match="length 9"):
        renderer(MISTRAL).losses([USER, {"role": "assistant", "tool_calls": [CALL | {"id": "1"}]}])
    cut = [USER, FIRST | {"content": "r</think>a"}]
    asking = DEEPSEEK.replace("{{ '<｜Assistant｜>' }}{% endif %}", "{{ '<｜Assistant｜><think>' }}{% endif %}")
    with pytest.raises(UserError, match="asks for an answer with '<think>"):
        renderer(asking).documents(cut)


def test_everything_but_a_weight_of_0():
    chat = [USER | {"train_on": "everything"}, FIRST | {"weight": 0}, AGAIN, SECOND]
    (part,) = renderer(LLAMA31).documents(chat)
    (start, stop), (after, end) = part.spans
    assert part.text[stop:after] == "a1<|eot_id|>"
    assert (start, end) == (0, len(part.text))
    (part,) = renderer(LLAMA31).documents([USER | {"train_on": "everything"}, FIRST])
    assert part.spans == [(0, len(part.text))]
    with pytest.raises(UserError, match="message 1 are the assistant's cannot be told"):
        renderer(QWEN3).documents(chat)


# --- The project's own templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_mark_the_answers_and_their_end(name):
    known = TEMPLATES[name]
    end = next((token for token in reversed(known.tokens) if "start" not in token), "</s>")
    for chat in (CHATS["plain"], CHATS["system"]):
        (part,) = renderer(known.source).documents(chat)
        learned = [part.text[a:b] for a, b in part.spans]
        assert learned == [f"{' ' * (name == 'mistral')}{answer}{end}" for answer in ("a1", "a2")]
        assert renderer(known.source).losses(chat) == []
        plain = known.source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        (unmarked,) = renderer(plain).documents(chat)  # the difference tells the same, where it can
        assert [unmarked.text[a:b] for a, b in unmarked.spans] == learned
        assert all(token in part.text for token in known.tokens)


# --- Against transformers, with the templates that TRL ships


def trl_templates():
    import trl

    return Path(trl.__file__).parent / "chat_templates"


NAMES = ["llama3", "llama3_2", "qwen2_5", "qwen3", "gemma3", "phi3", "cohere", "glm4moe", "gptoss", "deepseekv3"]


@pytest.fixture(scope="module")
def backend():
    tokenizer = Tokenizer.train([json.dumps(TOOL) * 3], 400).backend
    tokenizer.add_special_tokens([*ENDS, "<s>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>"])
    return tokenizer.to_str()


def peer(backend, source):
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(backend), bos_token="<s>", eos_token="<|im_end|>")
    made.chat_template = source
    return made


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_published_templates_render_as_transformers(backend, name):
    """Text with tools, calls and documents of the template as published; text and mask of TRL's marked version."""
    for kind in ("", "_training"):
        file = trl_templates() / f"{name}{kind}.jinja"
        if not file.exists():
            continue
        source, checked = file.read_text(), 0
        ours = Tokenizer(Backend.from_str(backend), bos="<s>", eos="<|im_end|>", chat_template=source)
        theirs = peer(backend, source)
        for chat in CHATS.values():
            for given in ({}, {"documents": [{"title": "t", "text": "x"}]}):
                messages = [{k: v for k, v in m.items() if k != "tools"} for m in chat]
                context = {"tools": chat[0].get("tools")} | given
                row = [messages[0] | {k: v for k, v in context.items() if v}, *messages[1:]]
                try:
                    try:
                        text = theirs.apply_chat_template(messages, tokenize=False, **context)
                    except TypeError:  # it expects the arguments of a call as text
                        messages = [named(message, texts=True) for message in messages]
                        text = theirs.apply_chat_template(messages, tokenize=False, **context)
                except Exception:  # a role or key that the template refuses
                    with pytest.raises(UserError):
                        ours.render_text(row)
                    continue
                checked += 1
                assert ours.render_text(row)[0] == text
                if kind:
                    found = theirs.apply_chat_template(
                        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **context
                    )
                    assert [part[:2] for part in ours.documents(row)] == [
                        (found["input_ids"], found["assistant_masks"])
                    ]
        assert checked >= 4


@pytest.mark.peer
@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "gemma3", "phi3", "qwen3_instruct_2507", "cohere"])
def test_the_difference_tells_what_trls_markers_do(name):
    """The answers of a published template without markers are those of TRL's marked version, but for white space behind
    the end token, which nobody has to produce."""
    sources = [(trl_templates() / f"{name}{kind}.jinja").read_text() for kind in ("", "_training")]
    plain, marked = (Renderer(ChatTemplate(s), {"bos_token": "<s>", "eos_token": "<|im_end|>"},
                              (*ENDS, "<|END_OF_TURN_TOKEN|>")) for s in sources)  # fmt: skip
    for chat in (CHATS["plain"], CHATS["system"]):
        (one,), (other,) = plain.documents(chat), marked.documents(chat)
        assert one.text == other.text
        learned = [other.text[a:b].strip() for a, b in other.spans]
        assert [one.text[a:b].strip() for a, b in one.spans] == learned[:2]
        assert learned[2:] == ["<|im_end|>"] * (name == "phi3")  # its second end token, which TRL has learned too
