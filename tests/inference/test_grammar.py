"""Structured output: every answer satisfies what was asked, whatever the model, its tokenizer, its guesses and its
company; the same answers as a peer's for beams."""

import json
import random
import re

import pytest
import torch
from small_served import byte_level, llama, sentencepiece

from finetune.errors import UserError
from finetune.inference import grammar
from finetune.inference.beams import BeamSearch, samples
from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.inference.speculative import DraftModel, PromptLookup

pytest.importorskip("llguidance")
TOKENIZERS = {"byte-level": byte_level, "sentencepiece": sentencepiece}
PERSON = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
}  # fmt: skip
ASKED = {
    "schema": (grammar.json_schema(PERSON), lambda text: person(json.loads(text))),
    "regex": (
        lambda: grammar.regex(r"(ab|ein){1,3} [0-9]{2}/[a-zé🙂]?"),
        re.compile(r"(ab|ein){1,3} [0-9]{2}/[a-zé🙂]?").fullmatch,
    ),
    "choice": (grammar.choice(["ein Tag", "ein", 'ab "süß"\n']), ["ein Tag", "ein", 'ab "süß"\n'].__contains__),
}


def person(value):
    assert set(value) in ({"name", "age"}, {"name", "age", "tags"})
    assert len(value["name"]) <= 5
    assert 0 <= value["age"] <= 130
    assert set(value.get("tags", [])) <= {"a", "b"}
    return True


def matcher_of(tokenizer, source, size=None):
    words = grammar.Vocabulary(tokenizer, size or tokenizer.vocab_size, {tokenizer.eos_id})
    return words.matcher(source() if callable(source) else source)


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS)
def tokenizer(request):
    return request.param()


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_any_path_through_the_mask_satisfies_what_was_asked(tokenizer, asked):
    """Tokens drawn at random from the mask; rows of the model's table without a token are never in it. What was read
    and is then dropped changes nothing."""
    source, fits = asked
    rng, texts = random.Random(0), set()
    first = matcher_of(tokenizer, source, tokenizer.vocab_size + 7)
    for _ in range(40):
        matcher, answer = first.copy(), []
        while not answer or answer[-1] != tokenizer.eos_id:
            mask = matcher.allowed(answer)
            assert not mask[tokenizer.vocab_size :].any()
            choices = mask.nonzero()[:, 0].tolist()
            for guess in rng.sample(choices, min(3, len(choices))):
                assert matcher.allowed([*answer, guess]).any()  # a guess that is rejected
            assert torch.equal(matcher.allowed(answer), mask)
            if answer and rng.random() < 0.2:
                matcher.allowed(answer[: rng.randrange(len(answer))])
            answer.append(rng.choice(choices))
            text = tokenizer.decode(answer, skip_special_tokens=True)
        assert fits(text), text
        assert matcher.allowed(answer).nonzero()[:, 0].tolist() == [tokenizer.eos_id]
        texts.add(text)
    assert len(texts) > 2


def test_white_space_is_bounded(tokenizer):
    """A model that writes white space wherever it may, finishes all the same."""
    loose = PERSON | {"x-guidance": {"whitespace_pattern": r"\s*"}}  # llguidance's own key: clients cannot set it
    matcher, answer = matcher_of(tokenizer, grammar.json_schema(loose)), []
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    rng = random.Random(1)
    while not answer or answer[-1] != tokenizer.eos_id:
        choices = matcher.allowed(answer).nonzero()[:, 0].tolist()
        blank = [i for i in choices if texts[i] and not texts[i].strip()]
        answer.append(rng.choice(blank or choices))
        assert len(answer) < 1000
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert person(json.loads(text))
    assert max(map(len, re.findall(r"\s+", text))) == 33


@pytest.mark.parametrize("drafter", ["none", "lookup", "model"])
@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(temperature=1.0, seed=5, repetition_penalty=1.1)], ids=["greedy", "sampled"]
)
def test_the_engine_writes_what_was_asked(tokenizer, drafter, how):
    """Under preemption, with guesses of which most are rejected, next to an answer without a grammar; the tokens are
    those that a request gets alone and without guesses."""
    model = llama(vocab_size=tokenizer.vocab_size + 5)
    words = grammar.Vocabulary(tokenizer, model.config.vocab_size, {tokenizer.eos_id})
    sources = [source() if callable(source) else source for source, _ in ASKED.values()]

    def ask(engine, i):
        return engine.add([5 + i] * 9, how, 60, {tokenizer.eos_id}, grammar=words.matcher(sources[i % 3]))

    alone = []
    for i in range(6):
        engine = Engine(model, blocks=80, block_size=4)
        one = ask(engine, i)
        engine.run()
        alone.append(one.answer)
    draft = llama(vocab_size=model.config.vocab_size, layers=1)
    guess = {"none": lambda: None, "lookup": PromptLookup, "model": lambda: DraftModel(draft, 200, 4)}
    engine = Engine(model, blocks=19, block_size=4, drafter=guess[drafter]())
    free = engine.add([1, 2, 3], Sampling(), 30)
    found = [ask(engine, i) for i in range(6)]
    engine.run()
    assert engine.scheduler.preemptions
    assert engine.proposed > engine.accepted or drafter == "none"
    assert len(free.answer) == 30
    for i, one in enumerate(found):
        if drafter != "model" or not how.temperature:  # its guesses are drawn, and accepted by a draw
            assert one.answer == alone[i]
        text = tokenizer.decode(one.answer, skip_special_tokens=True)
        if one.finish_reason == "stop":
            assert [*ASKED.values()][i % 3][1](text), text
        else:
            assert (one.finish_reason, len(one.answer)) == ("length", 60)
    assert any(one.finish_reason == "stop" for one in found)
    assert engine.pool.used == 0


def test_several_answers_have_a_grammar_each():
    tokenizer = byte_level()
    model = llama(vocab_size=tokenizer.vocab_size)
    source, fits = ASKED["regex"]
    engine = Engine(model, blocks=80, block_size=4)
    how = Sampling(temperature=1.5, seed=2)
    found = samples(engine, [3, 4, 5], how, 60, 5, {tokenizer.eos_id}, grammar=matcher_of(tokenizer, source))
    engine.run()
    texts = [tokenizer.decode(one.answer, skip_special_tokens=True) for one in found]
    assert all(map(fits, texts))
    assert len(set(texts)) > 1


def test_a_grammar_that_cannot_go_on_ends_its_answer_alone():
    """An answer that the grammar does not know, as after a change of the answer from outside: no other one is hurt."""
    tokenizer = byte_level()
    engine = Engine(llama(vocab_size=tokenizer.vocab_size), blocks=80, block_size=4)
    broken = engine.add([1, 2], Sampling(), 20, grammar=matcher_of(tokenizer, grammar.choice(["ab ab"])))
    whole = engine.add([1, 2], Sampling(), 20)
    broken.answer = tokenizer.encode("zz")
    engine.run()
    assert broken.finish_reason == "error"
    assert "cannot go on" in broken.error
    assert len(whole.answer) == 20
    assert engine.pool.used == 0


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: grammar.json_schema({"type": "objekt"}), "objekt"),
        (lambda: grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: grammar.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (lambda: grammar.json_schema({"$ref": "https://example.org/s"}), "example.org"),
        (lambda: grammar.json_schema({"type": "integer", "minimum": 2, "maximum": 1}), "greater than maximum"),
        (lambda: grammar.regex("[a"), "unclosed"), (lambda: grammar.regex("a(?=b)"), "look-around"),
        (lambda: grammar.choice([]), "at least one"),
        (lambda: grammar.choice(["a", ""]), "empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(make, what):
    with pytest.raises(UserError, match=what) as error:
        matcher_of(byte_level(), make)
    assert "\n" not in str(error.value)


def test_a_model_without_an_end_token_is_refused():
    with pytest.raises(UserError, match="end token"):
        grammar.Vocabulary(byte_level(), 100, set())


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match=r"finetune-lab\[grammar\]"):
        grammar.Vocabulary(byte_level(), 300, {2})


@pytest.mark.peer
def test_beams_are_those_of_transformers(tmp_path):
    """Its `prefix_allowed_tokens_fn` masks the log-probabilities, too, and does not normalize them again."""
    import transformers

    from finetune.lm.io import load

    tokenizer = byte_level()
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    model = load.llama(tmp_path).eval()
    for source, fits in ASKED.values():
        reader = matcher_of(tokenizer, source)
        prompt = torch.tensor([[5, 6, 7]])
        wanted = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=3, max_new_tokens=40, do_sample=False,
            eos_token_id=tokenizer.eos_id, pad_token_id=0,
            prefix_allowed_tokens_fn=lambda _, ids: reader.allowed(ids[3:].tolist()).nonzero()[:, 0].tolist(),  # noqa: B023
        )[0, 3:].tolist()  # fmt: skip
        engine = Engine(model, blocks=100, block_size=4)
        search = BeamSearch(
            engine, prompt[0].tolist(), 3, 40, {tokenizer.eos_id}, grammar=matcher_of(tokenizer, source)
        )
        engine.run()
        best = search.best[0]
        assert best == wanted[: len(best)]
        assert len(best) == 40 or fits(tokenizer.decode(best, skip_special_tokens=True))
        assert engine.pool.used == 0
