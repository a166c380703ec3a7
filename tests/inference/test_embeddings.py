"""Embeddings: pooled as they say, the same in any company, and served to OpenAI's own client."""

import httpx
import pytest
import torch
from small_served import llama, prompts
from small_server import serving

from finetune.inference.embeddings import Embedding
from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.inference.speculative import PromptLookup
from finetune.lm.tokenizer import Tokenizer


def pooled(model, row, pooling):
    """By definition."""
    with torch.no_grad():
        states = model(torch.tensor([row]), hidden=True)[0].double()
    value = states.mean(0) if pooling == "mean" else states[-1]
    return (value / value.norm()).float()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(
    "limits",
    [{"blocks": 200}, {"blocks": 24, "block_size": 4}, {"blocks": 60, "block_size": 1, "most_tokens": 3}],
    ids=str,
)
def test_vectors_are_those_of_the_definition(pooling, limits):
    """Next to answers with guesses, in parts, preempted, and where the prefix cache has the text already."""
    model = llama()
    engine = Engine(model, **limits, drafter=PromptLookup())
    rows = prompts(8)
    for row in rows[:2]:
        engine.add(row, Sampling(), 2)
    engine.run()
    answers = [engine.add(row, Sampling(), 20) for row in rows[:4]]
    found = [Embedding(engine, row, pooling) for row in [*rows, [5], [7] * 20, [7] * 20]]
    engine.run()
    assert engine.scheduler.preemptions or limits.get("most_tokens") or limits == {"blocks": 200}
    for row, one in zip([*rows, [5], [7] * 20, [7] * 20], found, strict=True):
        assert (one.value - pooled(model, row, pooling)).abs().max() < 1e-5
        assert one.sequence.answer == []
    for row, one in zip(rows, answers, strict=False):
        alone = Engine(model, blocks=200)
        wanted = alone.add(row, Sampling(), 20)
        alone.run()
        assert one.answer == wanted.answer
    assert (engine.pool.used, set(engine.pool.references)) == (0, {0})


def test_a_text_may_be_as_long_as_the_model():
    model = llama()
    engine = Engine(model, blocks=20)
    one = Embedding(engine, [3] * model.config.max_length, "last")
    engine.run()
    assert one.value.norm() == pytest.approx(1, abs=1e-6)


@pytest.fixture(scope="module")
def served():
    with serving(Tokenizer.train(["the quick brown fox"] * 3, vocab_size=300)) as found:
        yield found


@pytest.mark.peer
def test_openais_client(served):
    import openai

    base, server = served
    model, tokenizer = server.worker.engine.model, server.tokenizer
    texts = ["the fox", "quick", "the quick brown fox 🙂"]
    rows = [tokenizer.encode(text) for text in texts]
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        for given in (texts, rows):
            for form in ("float", "base64", openai.NOT_GIVEN):
                for pooling in ("mean", "last"):
                    found = client.embeddings.create(
                        model="small", input=given, encoding_format=form, extra_body={"pooling": pooling}
                    )
                    assert found.usage.prompt_tokens == sum(map(len, rows))
                    assert found.pooling == pooling
                    for i, (row, one) in enumerate(zip(rows, found.data, strict=True)):
                        assert one.index == i
                        if form == "base64":
                            continue
                        got = torch.tensor(one.embedding)
                        assert (got - pooled(model, row, pooling)).abs().max() < 1e-5
        for alone in ("the fox", rows[0]):
            (one,) = client.embeddings.create(model="small", input=alone).data
            assert (torch.tensor(one.embedding) - pooled(model, rows[0], "mean")).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("given", "status", "what"),
    [
        ({"input": ""}, 400, "empty"), ({"input": []}, 400, "input"), ({"input": ["a", 1]}, 400, "not several"),
        ({"input": ["a", ""]}, 400, "input 1"), ({"input": [[1], []]}, 400, "input"),
        ({"input": "x" * 5000}, 400, "fit"), ({"input": [[1000]]}, 400, "vocabulary"),
        ({"dimensions": 8}, 400, "dimensions"), ({"model": "b"}, 404, "served"),
        ({"encoding_format": "hex"}, 400, "encoding_format"), ({"pooling": "max"}, 400, "pooling"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_requests_get_the_apis_error_object(served, given, status, what):
    base, server = served
    answer = httpx.post(f"{base}/v1/embeddings", json={"model": "small", "input": "fox"} | given, timeout=60)
    assert answer.status_code == status
    assert what in answer.json()["error"]["message"]
    assert server.active == 0


def test_a_client_that_leaves_frees_its_blocks(served):
    base, server = served
    rows = [[i % 200] * 100 for i in range(2000)]
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{base}/v1/embeddings", json={"model": "small", "input": rows}, timeout=0.15)
    answer = httpx.post(f"{base}/v1/embeddings", json={"model": "small", "input": "fox"}, timeout=60)
    assert answer.status_code == 200
    assert (server.active, server.worker.engine.pool.used, server.worker.listeners) == (0, 0, {})
