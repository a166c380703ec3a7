"""The server as its clients see it: OpenAI's own client, streams, errors, clients that leave."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import browser
import httpx
import pytest
import rich.console
from small_served import adapter, llama
from small_server import alone, serving, trained_tokenizer

from finetune.errors import UserError
from finetune.inference.engine import Engine
from finetune.inference.generate import generate
from finetune.inference.sampler import Sampling
from finetune.inference.server import Server
from finetune.inference.worker import Worker
from finetune.lm.io import save
from finetune.peft.adapters import load_adapter
from finetune.serve import adapter_folders

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer()


@pytest.fixture(scope="module")
def served(tokenizer):
    with serving(tokenizer) as found:
        yield found


def chat(base, **given):
    body = {"model": "small", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 8, "seed": 1} | given
    return httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.peer
def test_openais_client(served, tokenizer):
    import openai

    base, server = served
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["small"]
    messages = [{"role": "user", "content": "the quick"}]
    prompt = tokenizer.encode(tokenizer.render_text(messages, add_generation_prompt=True)[0], add_special_tokens=False)
    given = {"model": "small", "messages": messages, "max_tokens": 12, "temperature": 1.0, "seed": 3, "n": 2}
    wanted = alone(server, prompt, Sampling(temperature=1.0, seed=3), 12, count=2)
    whole = client.chat.completions.create(**given)
    assert [(one.message.content, one.finish_reason) for one in whole.choices] == wanted
    assert whole.usage.prompt_tokens == len(prompt)
    assert whole.usage.total_tokens == len(prompt) + whole.usage.completion_tokens <= len(prompt) + 24
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        for one in chunk.choices:
            assert reasons[one.index] is None
            texts[one.index] += one.delta.content or ""
            reasons[one.index] = one.finish_reason
        usage = chunk.usage or usage
    assert list(zip(texts, reasons, strict=True)) == wanted
    assert usage == whole.usage
    found = client.chat.completions.create(**given | {"n": 1}, logprobs=True, top_logprobs=2).choices[0]
    assert "".join(one.token for one in found.logprobs.content[:3]).startswith(found.message.content[:1])
    assert all(
        len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob for one in found.logprobs.content
    )
    done = client.completions.create(model="small", prompt="the quick", max_tokens=5, temperature=0, logprobs=1)
    assert done.choices[0].text == alone(server, tokenizer.encode("the quick"), Sampling(), 5)[0][0]
    assert len(done.choices[0].logprobs.token_logprobs) == 5
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(**given | {"model": "other"})


def test_a_stop_string_ends_the_answer_before_it(served, tokenizer):
    base, server = served
    prompt = tokenizer.encode("the lazy", add_special_tokens=True)
    ((whole, _),) = alone(server, prompt, Sampling(), 20)
    stop = whole[4:7]
    for stream in (False, True):
        answer = httpx.post(f"{base}/v1/completions", timeout=60, json={
            "model": "small", "prompt": "the lazy", "max_tokens": 20, "temperature": 0, "stop": [stop],
            "stream": stream,
        })  # fmt: skip
        if stream:
            lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
            assert lines[-1] == "[DONE]"
            choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
            text, reasons = "".join(one["text"] for one in choices), [one["finish_reason"] for one in choices]
        else:
            (choice,) = answer.json()["choices"]
            text, reasons = choice["text"], [choice["finish_reason"]]
        assert text == whole[: whole.find(stop)]
        assert [reason for reason in reasons if reason] == ["stop"]


@pytest.mark.parametrize(
    ("given", "status", "what"),
    [
        ({"temperature": -1}, 400, "temperature"), ({"top_p": 0}, 400, "top_p"), ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 500}, 400, "does not fit"), ({"messages": []}, 400, "messages"), ({"n": 1000}, 400, "n"),
        ({"messages": [{"role": "user"}]}, 400, "content"), ({"model": "x"}, 404, "not served"),
        ({"stop": ["a", ""]}, 400, "stop string"), ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, 400, "logit_bias"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"), ({"seed": "a"}, 400, "seed"),
        ({"messages": [{"role": "user", "content": "a" * 3000}]}, 400, "does not fit"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_requests_get_the_apis_error_object(served, given, status, what):
    base, server = served
    answer = chat(base, **given)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert what in error["message"]
    assert error["type"] == "invalid_request_error"
    assert server.active == 0


def test_not_json_too_large_and_unknown_paths(served):
    base, _ = served
    for content, status in ((b"{", 400), (b"\xff", 400), (b"[" * 100_000, 400), (b"x" * (5 << 20), 413)):
        answer = httpx.post(f"{base}/v1/chat/completions", content=content, timeout=60)
        assert (answer.status_code, "error" in answer.json()) == (status, True)
    deep = "[" * 3000 + "]" * 3000
    for more in (
        f'"messages": [{{"role": "user", "content": {deep}}}]',
        f'"messages": [{{}}], "guided_json": {{"a": {deep}}}',
    ):
        answer = httpx.post(f"{base}/v1/chat/completions", content=f'{{"model": "small", {more}}}', timeout=60)
        assert (answer.status_code, "deeply" in answer.json()["error"]["message"]) == (400, True)
    assert httpx.get(f"{base}/v1/nothing").json()["error"]["message"] == "Not Found"
    assert chat(base).status_code == 200


def test_a_key_is_needed_where_one_is_set(tokenizer):
    with serving(tokenizer, key="secret") as (base, _):
        assert chat(base).status_code == 401
        assert httpx.get(f"{base}/v1/models").status_code == 401
        assert httpx.get(f"{base}/health").status_code == 200
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{base}/v1/models", headers=headers).status_code == 200


def test_a_request_chooses_an_adapter_by_the_name_of_its_model(tokenizer, tmp_path):
    """In one batch; the adapter's name, or the model's and it."""
    size = {"vocab_size": tokenizer.vocab_size}
    folders = {name: adapter(tmp_path / name, seed, llama(**size)) for seed, name in enumerate(("law", "verse"))}
    prompt, wanted = tokenizer.encode("the quick"), {}
    for name, folder in ({"small": None} | folders).items():
        model = llama(**size)
        if folder:
            load_adapter(model, folder)
        wanted[name] = tokenizer.decode(generate(model, [prompt], 12, stop_ids=[tokenizer.eos_id])[0])
    assert len(set(wanted.values())) == 3
    with serving(tokenizer, engine={"adapters": folders}) as (base, server):
        listed = httpx.get(f"{base}/v1/models").json()["data"]
        assert [(one["id"], one.get("parent")) for one in listed] == [
            ("small", None), ("small:law", "small"), ("small:verse", "small")
        ]  # fmt: skip

        async def everyone(names):
            async with httpx.AsyncClient(timeout=60) as client:
                body = {"prompt": "the quick", "max_tokens": 12, "temperature": 0}
                asked = [client.post(f"{base}/v1/completions", json=body | {"model": name}) for name in names]
                return [answer.json() for answer in await asyncio.gather(*asked)]

        names = ["small", "law", "small:verse", "verse", "small", "small:law"]
        for name, found in zip(names, asyncio.run(everyone(names)), strict=True):
            assert (found["model"], found["choices"][0]["text"]) == (name, wanted[name.removeprefix("small:")])
        for name in ("prose", "small:prose", "law:small", ""):
            answer = chat(base, model=name)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert server.worker.engine.pool.used == 0
    with pytest.raises(UserError, match="the name of the model"):
        Server(Worker(Engine(llama(), 10, adapters={"small": adapter(tmp_path / "s")})), tokenizer, "small", set())
    twice = {"a": tmp_path / "s", "small:a": tmp_path / "s"}
    with pytest.raises(UserError, match="of another"):
        Server(Worker(Engine(llama(), 10, adapters=twice)), tokenizer, "small", set())


def test_too_many_requests_are_refused(tokenizer):
    with serving(tokenizer, most_requests=0) as (base, _):
        answer = chat(base)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_an_error_of_the_server_has_the_apis_form(tokenizer, monkeypatch):
    with serving(tokenizer) as (base, server):
        monkeypatch.setattr(server.tokenizer, "encode", lambda *_, **__: 1 / 0)
        answer = chat(base)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        monkeypatch.undo()
        assert chat(base).status_code == 200


def test_a_failed_engine_is_an_error_and_not_silence(tokenizer):
    with serving(tokenizer) as (base, server):
        server.worker.engine.step = lambda: 1 / 0
        assert chat(base).status_code == 500
        assert httpx.get(f"{base}/health").status_code == 503
        assert chat(base).status_code == 503


def test_a_body_that_does_not_end_is_given_up(served, monkeypatch):
    base, server = served
    monkeypatch.setattr("finetune.inference.server.BODY_SECONDS", 0.2)
    host, port = base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
    assert server.active == 0


def test_a_client_that_leaves_before_its_body_has_arrived_is_no_error_of_the_server(served, caplog):
    host, port = served[0].removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            time.sleep(0.05)
    assert httpx.get(f"{served[0]}/health").status_code == 200
    assert "Traceback" not in caplog.text
    assert not caplog.records


def test_the_command_serves_until_it_is_told_to_stop(tokenizer, tmp_path):
    """A request under way when SIGTERM comes is answered; then the process ends with 0."""
    model = llama(vocab_size=tokenizer.vocab_size)
    save.model(model, tmp_path / "small", tokenizer)
    adapter(tmp_path / "law", model=model)
    words = ["serve", "--model", tmp_path / "small", "--port", "0", "--threads", "1", "--cache-tokens", "256",
             "--dtype", "bfloat16", "--adapter", f"law={tmp_path / 'law'}"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", *map(str, words)], stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    try:
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)
        base = next(match[0] for match in found if match)
        assert "finetune" in httpx.get(base).text
        if (sockets := Path("/proc/net/tcp")).exists():  # of all addresses it listens at the loopback's alone
            port = f":{int(base.rsplit(':')[-1]):04X}"
            listening = [row.split()[1] for row in sockets.read_text().splitlines() if row.split()[3] == "0A"]
            assert [address for address in listening if address.endswith(port)] == [f"0100007F{port}"]
        assert [one["id"] for one in httpx.get(f"{base}/v1/models").json()["data"]] == ["small", "small:law"]
        body = {"model": "small", "prompt": "the quick", "max_tokens": 100, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert process.wait(30) == 0
    finally:
        process.kill()
    small = tmp_path / "small"
    for wrong, what in (
        (["--model", tmp_path / "none"], "none"),
        (["--model", small, "--host", "999.1.1.1"], "--host"),
    ):
        words = [sys.executable, "-m", "finetune", "serve", *map(str, wrong)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, what in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_adapter_options_are_checked(tmp_path):
    console, one = rich.console.Console(), adapter(tmp_path / "a")
    assert adapter_folders((f"x={one}", f"y={one}"), console) == {"x": one, "y": one}
    for wrong, what in (
        (["x"], "NAME=DIR"), ([f"={one}"], "NAME=DIR"), (["x="], "NAME=DIR"), ([f"x={one}", f"x={one}"], "twice"),
        ([f"x={tmp_path}"], "not an adapter"), ([f"x={tmp_path}/none"], "none"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=what):
            adapter_folders(tuple(wrong), console)


@pytest.mark.slow
@pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium (Debian: apt install chromium)")
def test_the_page_in_a_browser(served, tokenizer):
    base, server = served
    with browser.opened(base) as page:
        page.until("document.getElementById('title').textContent === 'small'")
        page.js("document.getElementById('temperature').value = 0; document.getElementById('length').value = 10")
        page.type("the quick fox")
        page.press("Enter")
        said = page.until("!stop && messages.length === 2 && messages[1].content")
        messages = [{"role": "user", "content": "the quick fox"}]
        prompt = tokenizer.encode(tokenizer.render_text(messages, add_generation_prompt=True)[0], False)
        assert said == alone(server, prompt, Sampling(), 10)[0][0]
        assert page.js("document.querySelector('.assistant').textContent") == said
        assert page.js("document.activeElement.id") == "text"
        assert "tokens/s" in page.js("document.getElementById('note').textContent")
        # Escape ends an answer, and its blocks are free
        page.js("document.getElementById('length').value = 30")
        server.worker.engine.step, step = (lambda: (time.sleep(0.2), step())[1]), server.worker.engine.step
        page.type("the lazy dog")
        page.press("Enter")
        page.until("stop && document.querySelectorAll('.assistant')[1].textContent")
        page.js("document.getElementById('view').click()")
        page.until("document.querySelectorAll('#sequences tr').length === 2")
        assert page.js("document.querySelectorAll('#grid i').length") == 60
        page.press("Escape")
        page.until("!stop")
        page.until("document.querySelectorAll('#sequences tr').length === 1")
        server.worker.engine.step = step
        assert server.active == server.worker.engine.pool.used == 0
        page.js("document.getElementById('language').click()")
        assert page.js("document.getElementById('view').textContent") == "对话"
        for language in ("en", "zh"):  # every word has a text in both languages, and stands on the page
            missing = (
                f"[...document.querySelectorAll('[data-t]')].filter(one => !words.{language}[one.dataset.t]).length"
            )
            assert page.js(missing) == 0
        # a system message
        page.js("document.getElementById('view').click(); document.getElementById('clear').click()")
        page.js("document.getElementById('system').value = 'be brief'; document.getElementById('length').value = 5")
        page.type("the fox")
        page.press("Enter")
        said = page.until("!stop && messages.length === 2 && messages[1].content")
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox"}]
        prompt = tokenizer.encode(tokenizer.render_text(messages, add_generation_prompt=True)[0], False)
        assert said == alone(server, prompt, Sampling(), 5)[0][0]
        assert page.js("document.getElementById('choice').offsetHeight") == 0
        # an error of the server is shown
        page.js("document.getElementById('length').value = 100000")
        page.js("document.getElementById('text').focus()")
        page.type("again")
        page.press("Enter")
        assert "does not fit" in page.until("document.querySelector('.error')?.textContent")
