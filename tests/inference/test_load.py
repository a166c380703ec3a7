"""The server under load: 32 clients, who abandon a tenth of their requests and send a twentieth malformed. Every other
request gets the answer that it gets alone, no block is lost, and memory is flat."""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from small_served import llama

from finetune.lm.chat_template import chatml
from finetune.lm.io import save
from finetune.lm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "🙂", "süß", "user", "assistant"]
BLOCKS, CLIENTS = 24, 32
MIB = 1 << 20


@contextlib.contextmanager
def command(folder):
    """(process, address) of `python -m finetune serve`, with so small a cache that sequences are preempted."""
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 3, vocab_size=300)
    tokenizer.chat_template = chatml()
    save.model(llama(vocab_size=tokenizer.vocab_size), folder, tokenizer)
    words = ["serve", "--model", folder, "--port", "0", "--threads", "1", "--cache-tokens", BLOCKS * 16]
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", *map(str, words)], stderr=file, cwd=ROOT,
            env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield process, found[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()


def requests(count, seed=0):
    """(path, body) of well-formed requests of all kinds, with definite answers."""
    rng = random.Random(seed)
    for i in range(count):
        text = "the quick " + " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 12)))
        body = {"model": "small", "max_tokens": rng.randrange(1, 24), "seed": i, "stream": i % 2 == 0,
                "temperature": rng.choice((0, 0.8))}  # fmt: skip
        if i % 10 == 7:
            yield "/v1/embeddings", {"model": "small", "input": [text, text[:9]], "encoding_format": "base64"}
        elif i % 10 == 4:
            yield "/v1/completions", body | {"prompt": text, "guided_regex": "(fox|dog 🙂){1,4} [0-9]{1,3}"}
        elif i % 3:
            yield "/v1/completions", body | {"prompt": text}
        else:
            yield "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}], "n": 1 + i % 2}


MALFORMED = [
    (b"{", 400), (b"\xff", 400), (b'{"model": "small"}', 400), (b'{"model": "other", "prompt": "x"}', 404),
    (b'{"model": "small", "prompt": "x", "max_tokens": -1}', 400), (b'{"model": "small", "prompt": ""}', 400),
    (json.dumps({"model": "small", "prompt": "fox " * 900}).encode(), 400), (b" " * (5 << 20), 413),
]  # fmt: skip


async def answer(client, path, body):
    """The texts and finish reasons of the choices, or the vectors."""
    found = await client.post(path, json=body)
    assert found.status_code == 200, found.text
    if path.endswith("embeddings"):
        return [base64.b64decode(one["embedding"]) for one in found.json()["data"]]
    if not body["stream"]:
        return [((one.get("message") or {}).get("content", one.get("text")), one["finish_reason"])
                for one in found.json()["choices"]]  # fmt: skip
    texts, reasons = {}, {}
    lines = [line[6:] for line in found.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    for one in (choice for line in lines[:-1] for choice in json.loads(line)["choices"]):
        piece = one["delta"].get("content", "") if "delta" in one else one["text"]
        texts[one["index"]] = texts.get(one["index"], "") + piece
        if one["finish_reason"]:
            assert one["index"] not in reasons
            reasons[one["index"]] = one["finish_reason"]
    return [(texts[i], reasons[i]) for i in sorted(texts)]


async def leave(client, path, body, early):
    """Closes the connection: before an answer can be there, or behind the first piece of a stream."""
    with contextlib.suppress(httpx.TimeoutException):
        if early or path.endswith("embeddings"):
            await client.post(path, json=body, timeout=0.003)
        else:
            async with client.stream("POST", path, json=body | {"stream": True, "max_tokens": 60}) as found:
                async for _ in found.aiter_lines():
                    break


def same(found, wanted):
    """Texts to the letter; vectors, whose sums have the order of their parts, closely."""
    if isinstance(wanted[0], bytes):
        return len(found) == len(wanted) and all(close(a, b) for a, b in zip(found, wanted, strict=True))
    return found == wanted


def close(one, other):
    return np.abs(np.frombuffer(one, "<f4") - np.frombuffer(other, "<f4")).max() < 1e-5


def resident(process):
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def load(process, base, seconds, least):
    """Clients ask until `least` requests are made and `seconds` are over. Counts by kind, and the bytes that are
    resident after each tenth of `least`."""
    asked = list(requests(60))
    counts = {"answered": 0, "left": 0, "malformed": 0}
    memory, end = [], time.time() + seconds
    async with httpx.AsyncClient(base_url=base, timeout=300, limits=httpx.Limits(max_connections=CLIENTS)) as client:
        wanted = [await answer(client, path, body) for path, body in asked]  # each alone
        numbers = itertools.count()

        async def one_client():
            for i in numbers:
                if i >= least and time.time() > end:
                    return
                if i % (least // 10) == 0:
                    memory.append(resident(process))
                rng = random.Random(i)
                at, kind = rng.randrange(len(asked)), rng.random()
                if kind < 0.1:
                    await leave(client, *asked[at], early=rng.random() < 0.5)
                    counts["left"] += 1
                elif kind < 0.15:
                    content, status = MALFORMED[rng.randrange(len(MALFORMED))]
                    found = await client.post("/v1/completions", content=content)
                    assert (found.status_code, "error" in found.json()) == (status, True)
                    counts["malformed"] += 1
                else:
                    assert same(await answer(client, *asked[at]), wanted[at]), asked[at]
                    counts["answered"] += 1

        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
        memory.append(resident(process))
        for _ in range(200):
            state = (await client.get("/state")).json()
            if not state["sequences"]:
                break
            await asyncio.sleep(0.05)
        assert state["sequences"] == []
        assert state["references"] == [0] * BLOCKS
        page = (await client.get("/metrics")).text
    numbers = dict(re.findall(r"^finetune_(\w+) ([\d.]+)$", page, re.MULTILINE))
    assert (
        float(numbers["used_blocks"]) == float(numbers["running_sequences"]) == float(numbers["waiting_sequences"]) == 0
    )
    assert float(numbers["preemptions"]) > 0
    assert float(numbers["requests_total"]) >= counts["answered"]
    return counts, memory


def check(folder, seconds, least):
    with command(folder) as (process, base):
        counts, memory = asyncio.run(load(process, base, seconds, least))
    total = sum(counts.values())
    assert total >= least
    assert 0.07 < counts["left"] / total < 0.13
    assert 0.03 < counts["malformed"] / total < 0.07
    settled = memory[len(memory) // 2 :]
    assert settled[-1] - settled[0] < 8 * MIB, [round(one / MIB, 1) for one in memory]


@pytest.mark.slow
def test_two_minutes(tmp_path):
    check(tmp_path / "small", 120, 1000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_fifteen_minutes(tmp_path):
    check(tmp_path / "small", 900, 1000)
