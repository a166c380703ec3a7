"""Every number on /metrics against what the requests did."""

import asyncio
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from small_served import llama
from small_server import serving, trained_tokenizer

from finetune.inference.speculative import DraftModel


def numbers(base):
    """name → value; of a histogram its sum and its count."""
    page = httpx.get(f"{base}/metrics").text
    return {
        sample.name.removeprefix("finetune_"): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


async def ask(base, bodies):
    async with httpx.AsyncClient(timeout=60) as client:
        given = {"model": "small", "temperature": 0, "logit_bias": {"1": -100}}
        answers = [client.post(f"{base}/v1/completions", json=given | body) for body in bodies]
        return [answer.json()["usage"]["completion_tokens"] for answer in await asyncio.gather(*answers)]


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer()


def test_counts_and_times_are_those_of_the_requests(tokenizer):
    prompts = [[5 + i, *range(20, 40)] for i in range(4)]
    model = llama(vocab_size=tokenizer.vocab_size)
    with serving(tokenizer, model=model, engine={"drafter": DraftModel(model, 99, count=3)}) as (base, server):
        engine = server.worker.engine
        engine.step, step = (lambda: (time.sleep(0.02), step())[1]), engine.step
        before, began = numbers(base), time.perf_counter()
        made = asyncio.run(ask(base, [{"prompt": p, "max_tokens": 12, "n": 1 + i % 2} for i, p in enumerate(prompts)]))
        took, found = time.perf_counter() - began, numbers(base)
        assert {name for name, value in before.items() if value} == {"blocks"}
        assert found["requests_total"] == len(prompts)
        assert found["generated_tokens_total"] == sum(made) > 40
        assert found["time_to_first_token_seconds_count"] == len(prompts)
        assert 0.02 < found["time_to_first_token_seconds_sum"] / len(prompts) < took
        answers = sum(1 + i % 2 for i in range(len(prompts)))
        assert found["time_per_token_seconds_count"] == sum(made) - answers
        # each answer's tokens but the first, one after the other, all within the time of the run
        assert 0.005 * (sum(made) - answers) < found["time_per_token_seconds_sum"] < answers * took
        assert (found["guessed_tokens"], found["accepted_tokens"]) == (engine.proposed, engine.accepted)
        assert found["guessed_tokens"] >= found["accepted_tokens"] > 0
        assert (found["prefix_hit_tokens"], found["prefix_miss_tokens"]) == (0, 4 * 21)
        asyncio.run(ask(base, [{"prompt": prompts[0], "max_tokens": 1}]))
        assert numbers(base)["prefix_hit_tokens"] == 20
        assert numbers(base)["used_blocks"] == numbers(base)["running_sequences"] == 0


def test_the_queue_and_the_blocks_are_those_of_the_moment(tokenizer):
    with serving(tokenizer, blocks=12, engine={"most_sequences": 2}) as (base, server):
        engine = server.worker.engine
        engine.step, step = (lambda: (time.sleep(0.05), step())[1]), engine.step

        async def watched():
            asked = asyncio.ensure_future(ask(base, [{"prompt": [5 + i] * 9, "max_tokens": 20} for i in range(5)]))
            seen = []
            while not asked.done():
                seen.append(await asyncio.to_thread(numbers, base))
                await asyncio.sleep(0.02)
            return seen

        seen = asyncio.run(watched())
        assert all(one["blocks"] == 12 and one["used_blocks"] <= 12 for one in seen)
        assert all(one["running_sequences"] <= 2 for one in seen)
        assert max(one["waiting_sequences"] for one in seen) in (3, 4, 5)  # 2 of 5 run
        assert max(one["used_blocks"] for one in seen) >= 10
        last = numbers(base)
        assert (last["waiting_sequences"], last["running_sequences"], last["used_blocks"]) == (0, 0, 0)
        assert last["preemptions"] == engine.scheduler.preemptions > 0  # 2 · 28 tokens do not fit into 48
