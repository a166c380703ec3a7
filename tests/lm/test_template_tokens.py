"""A template given to a model without one: its tokens, their embeddings, the token that ends an answer."""

import pytest
import torch
from small_gguf import TEXT, tiny
from tokenizers import models, pre_tokenizers, trainers

from finetune.errors import UserError
from finetune.lm import template_tokens
from finetune.lm.chat_template import TEMPLATES
from finetune.lm.tokenizer import GPT2, Tokenizer, byte_level


def base(eos="<|endoftext|>"):
    """The tokenizer of a base model: one special token, no template."""
    backend = byte_level(models.BPE(), GPT2)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=alphabet,
    ))  # fmt: skip
    return Tokenizer(backend, bos="<|endoftext|>", eos=eos)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_ends_answers_with_a_token(name):
    tokenizer = base()
    names, added = template_tokens.adopt(tokenizer, name)
    assert tuple(names) == tuple(added) == TEMPLATES[name].tokens
    assert tokenizer.eos == (names[-1] if names else "<|endoftext|>")
    ids, mask = tokenizer.render([{"role": "user", "content": "What"}, {"role": "assistant", "content": "comes"}])
    assert [i for i, learned in zip(ids, mask, strict=True) if learned][-1] == tokenizer.eos_id
    assert template_tokens.adopt(tokenizer, name)[1] == []  # a second time nothing is new


def test_a_file(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(
        "{# <|never|> #}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    tokenizer = base()
    assert template_tokens.adopt(tokenizer, str(file)) == (["<|turn|>"], ["<|turn|>"])
    assert tokenizer.eos == "<|endoftext|>"
    file.write_text(file.read_text().replace("{{ eos_token }}", "\n"))
    with pytest.raises(UserError, match=r"no token ends an answer, .* never stop: write \{\{ eos_token"):
        template_tokens.adopt(base(), str(file))
    with pytest.raises(UserError, match="ends answers with eos_token, and the model has none: choose chatml"):
        template_tokens.adopt(base(eos=None), "zephyr")
    with pytest.raises(UserError, match=r"no such file, and the names are chatml, .*; did you mean 'chatml'"):
        template_tokens.adopt(base(), "chatlm")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 30])
def test_new_tokens_get_rows(tied, padding):
    tokenizer = base()
    size = tokenizer.vocab_size + padding
    torch.manual_seed(0)
    model = tiny(vocab_size=size, tied=tied)
    model.token_ids = {"eos_token_id": [0, 5]}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names, added = template_tokens.adopt(tokenizer, "chatml")
    assert template_tokens.embed(model, tokenizer, names, added) == added == ["<|im_start|>", "<|im_end|>"]
    assert model.config.vocab_size == max(size, tokenizer.vocab_size) == len(model.embed.weight)
    start, end = (tokenizer.backend.token_to_id(name) for name in names)
    for table in ["embed.weight"] if tied else ["embed.weight", "head.weight"]:
        old, now = before[table], dict(model.named_parameters())[table]
        same = [i for i in range(size) if i not in (start, end)]
        assert torch.equal(now[same], old[same])
        assert torch.equal(now[end], old[0])  # the model's own end token
        pieces = [i for part in ("<|", "im_start", "|>") for i in base().encode(part)]
        assert torch.allclose(now[start], old[pieces].mean(0))
    assert model(torch.tensor([[start, end]])).shape[-1] == model.config.vocab_size
    template_tokens.end_ids(model, tokenizer)
    assert model.token_ids["eos_token_id"] == [end, 0, 5]
    assert model.generation_ids == {}


def test_tokens_that_the_model_never_learned_count_as_new():
    """Reserved tokens, whose rows are nearly 0; those of others are left as they are."""
    tokenizer = base()
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    model = tiny(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.embed.weight[tokenizer.backend.token_to_id("<|im_end|>")] *= 1e-4
    names, added = template_tokens.adopt(tokenizer, "chatml")
    assert added == []
    kept = model.embed.weight[tokenizer.backend.token_to_id("<|im_start|>")].clone()
    assert template_tokens.embed(model, tokenizer, names, added) == ["<|im_end|>"]
    assert torch.equal(model.embed.weight[tokenizer.backend.token_to_id("<|im_start|>")], kept)
    assert template_tokens.embed(model, tokenizer, names, added) == []
