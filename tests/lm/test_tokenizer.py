"""Tokenizer: texts there and back, chat rendering with the assistant's mask, and equality with transformers."""

import json

import pytest
from tokenizers import pre_tokenizers

from finetune.errors import UserError
from finetune.lm.chat_template import SMOLLM_SYSTEM, ChatTemplate, chatml, same_text, with_markers
from finetune.lm.io import load, save
from finetune.lm.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world! It's the user's 3rd try; we'll see.",
    "  two  spaces   and\ttabs\t\tand trailing  ",
    "\n\nlines\r\nwith\n\n\n  indents\n",
    "def f(x: int = 0) -> str:\n    if x != 1:\n\treturn f'{x!r}'  # done\n",
    "naïve café Straße Ελληνικά русский עברית العربية हिन्दी 日本語 中文 한국어",
    "🙂👩‍👩‍👧‍👦🇫🇷 e\u0301 \u200b\ufeff \U0001f9d1\U0001f3fd \u00a0nbsp \ufffd",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start|> <file_sep>x<|im_en",
    "https://example.org/a?b=c&d=%20 a_b-c.d/e\\f \"quoted\" 'single' `code` ~!@#$%^&*()",
    "\x00\x01\x7f\x80",
]
# Digits behind more than one space or line break are cut otherwise by transformers' GGUF reader (see tokenizer.py).
DIGITS = ["12345 3.14159 1e-5 x2y3", "\n\n1. First\n\n2. Second", "x =  12\n    100", "  7", "٣٤٥ ½ ²  ١"]
CHATS = [
    [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! 🙂"},
        {"role": "user", "content": "Bye <|im_end|>"},
        {"role": "assistant", "content": "  \n\nindented 日本語\n"},
    ],
    [{"role": "assistant", "content": "first"}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "no answer"}],
    [{"role": "system", "content": "only"}, {"role": "tool", "content": "{'a': 1}"}],
]


@pytest.fixture(scope="module")
def small():
    return Tokenizer.train(TEXTS[2:7] * 3, 400)


def test_texts_there_and_back(small, smollm2_tokenizer):
    for text in TEXTS + DIGITS:
        for tokenizer in (small, smollm2_tokenizer):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert small.vocab_size == 400
    assert len(small.encode(TEXTS[2])) < 0.7 * len(TEXTS[2])  # it has learned merges
    assert small.token_ids() == smollm2_tokenizer.token_ids() | {}
    assert small.decode([1, 2], skip_special_tokens=True) == ""


def test_smollm2_ids(smollm2_tokenizer):
    assert smollm2_tokenizer.vocab_size == 49152
    assert smollm2_tokenizer.token_ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert smollm2_tokenizer.encode("Hello world<|im_end|>") == [19556, 905, 2]
    tokens = smollm2_tokenizer.backend.encode("\n\n1. a  23").tokens
    assert tokens == ["ĊĊ", "1", ".", "Ġa", "ĠĠ", "2", "3"]  # every digit stands alone, and takes no space along


@pytest.mark.parametrize("chat", CHATS)
def test_mask_is_the_answers_and_their_ends(smollm2_tokenizer, chat):
    ids, mask = smollm2_tokenizer.render(chat)
    learned = smollm2_tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])
    answers = [message["content"] + "<|im_end|>" for message in chat if message["role"] == "assistant"]
    if chat is CHATS[1]:
        # the line break of `assistant\n` joins those that the answer begins with into tokens of its own
        assert learned.replace("\n", "") == "".join(answers).replace("\n", "")
    else:
        assert learned == "".join(answers)
    assert len(ids) == len(mask)
    assert set(mask) <= {0, 1}


def test_rendered_text(smollm2_tokenizer, small):
    ids, mask = smollm2_tokenizer.render(CHATS[0])
    assert smollm2_tokenizer.decode(ids) == (
        f"<|im_start|>system\n{SMOLLM_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert mask[-3:] == [1, 1, 0]
    assert sum(mask) == 2
    ids, mask = small.render(CHATS[0][:1], add_generation_prompt=True)
    assert small.decode(ids) == "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert not any(mask)


def test_default_system_may_hold_anything():
    odd = 'He said "it\'s {{ 1 }} \\n {% if %}" — 🙂\nnew line'
    text, _ = ChatTemplate(chatml(odd)).render(messages=CHATS[0][:1])
    assert text.startswith(f"<|im_start|>system\n{odd}<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize("source", ["small", "smollm2_tokenizer"])
def test_save_and_load(tmp_path, request, source):
    tokenizer = request.getfixturevalue(source)
    save.tokenizer(tokenizer, tmp_path)
    again = load.tokenizer(tmp_path)
    assert again.token_ids() == tokenizer.token_ids()
    assert again.chat_template == tokenizer.chat_template
    assert again.backend.to_str() == tokenizer.backend.to_str()
    assert again.render(CHATS[1]) == tokenizer.render(CHATS[1])


def test_foreign_templates(small):
    theirs = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(small.backend, chat_template=theirs)
    assert tokenizer.render_text(CHATS[0])[0] == "<user>What is 2+2?<assistant>4"
    ids, mask = tokenizer.render(CHATS[0])
    assert tokenizer.decode([i for i, kept in zip(ids, mask, strict=True) if kept]) == "<assistant>4"
    tokenizer.chat_template = (
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'assistant' -%}\n"
        "        {%- generation -%} {{ m.content | tojson }} {%- endgeneration -%}\n"
        "    {%- else %}[{{ m.content }}]{% endif %}\n"
        "{%- endfor %}"
    )
    assert tokenizer.render_text(CHATS[0]) == ('[What is 2+2?]"4"', [(14, 17)])
    assert with_markers(theirs) == theirs
    assert not same_text(theirs, chatml())


def test_errors(tmp_path, small):
    def fails(match, call, *args):
        with pytest.raises(UserError, match=match):
            call(*args)

    fails("-1 is not a token id", small.decode, [-1])
    assert small.decode([5, 400, 6]) == small.decode([5, 6])  # a model's table may have more rows than there are tokens
    fails("message 1 needs", small.render, [CHATS[0][0], {"role": "user"}])
    fails("message 0 needs", small.render, [{"role": "user", "content": None}])
    fails("no chat template", Tokenizer(small.backend).render, CHATS[0])
    fails("does not compile", Tokenizer(small.backend, chat_template="{% for %}").render, CHATS[0])
    refusing = "{{ raise_exception('roles must alternate') }}"
    fails("roles must alternate", Tokenizer(small.backend, chat_template=refusing).render_text, CHATS[0])
    sandboxed = "{{ messages.__class__.__mro__ }}"
    fails("refuses", Tokenizer(small.backend, chat_template=sandboxed).render_text, CHATS[0])
    fails("too small", Tokenizer.train, [], 258)
    fails("no tokenizer.json", load.tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    fails("tokenizer.json: object missing required field .model.", load.tokenizer, tmp_path)


def test_special_tokens_as_objects_and_named_templates(tmp_path, small):
    save.tokenizer(small, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["eos_token"] = {"content": "<|im_end|>", "lstrip": False}
    settings["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    file.write_text(json.dumps(settings))
    again = load.tokenizer(tmp_path)
    assert (again.eos_id, again.chat_template) == (2, "y")
    (tmp_path / "chat_template.jinja").write_text("z")
    assert load.tokenizer(tmp_path).chat_template == "z"


@pytest.mark.peer
def test_our_folder_in_transformers(smollm2, smollm2_tokenizer):
    """The same ids, texts and masks by transformers' tokenizer and its own rendering of our template."""
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(smollm2)
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (1, 2, 0)
    for text in TEXTS + DIGITS:
        ids = smollm2_tokenizer.encode(text)
        assert peer(text)["input_ids"] == ids
        assert peer.decode(ids) == smollm2_tokenizer.decode(ids)
    for chat in CHATS:
        theirs = peer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert (theirs["input_ids"], theirs["assistant_masks"]) == smollm2_tokenizer.render(chat)
        prompt = peer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert prompt == smollm2_tokenizer.render(chat, add_generation_prompt=True)[0]


@pytest.mark.peer
def test_gguf_tokenizer_equals_transformers(smollm2, smollm2_tokenizer):
    """transformers builds its tokenizer from the GGUF by its own code, and renders the file's own chat template."""
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    for text in TEXTS:
        assert peer(text)["input_ids"] == smollm2_tokenizer.encode(text)
    assert peer.get_vocab() == smollm2_tokenizer.backend.get_vocab()
    for chat in CHATS:
        for prompt in (False, True):
            theirs = peer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            assert theirs == smollm2_tokenizer.render_text(chat, prompt)[0]
    # Its reader passes over `tokenizer.ggml.pre = smollm`. With the rule of that name (each digit alone, then GPT-2's
    # expression; llama.cpp, llama-vocab.cpp) the rest is the same.
    assert any(peer(text)["input_ids"] != smollm2_tokenizer.encode(text) for text in DIGITS)
    peer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in TEXTS + DIGITS:
        assert peer(text)["input_ids"] == smollm2_tokenizer.encode(text)
