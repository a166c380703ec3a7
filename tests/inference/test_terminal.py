"""A conversation in a terminal and from a pipe."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_served import adapter, llama

from finetune.errors import UserError
from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.inference.text import TextStream
from finetune.inference.worker import Worker
from finetune.lm.io import save
from finetune.lm.tokenizer import Tokenizer
from finetune.terminal import CONTROLS, Settings, Talk, chat, converse

ROOT = Path(__file__).parents[2]
SIZE = {"max_length": 512}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog user assistant system"] * 3, vocab_size=300)


@pytest.fixture
def talk(tokenizer, tmp_path):
    torch.set_num_threads(1)
    model = llama(vocab_size=tokenizer.vocab_size, **SIZE)
    folder = adapter(tmp_path / "law", 1, llama(vocab_size=tokenizer.vocab_size, **SIZE))
    worker = Worker(Engine(model, blocks=60, block_size=8, adapters={"law": folder}))
    worker.start()
    notes = Console(file=io.StringIO(), width=80)
    yield Talk(
        worker, tokenizer, {tokenizer.eos_id}, Settings(temperature=0, max_tokens=12), out=io.StringIO(), notes=notes
    )
    worker.stop()
    worker.join(10)
    assert worker.engine.pool.used == 0
    assert not worker.listeners


def alone(talk, messages, how=None, most_new=12):
    prompt = talk.tokenizer.encode(talk.tokenizer.render_text(messages, add_generation_prompt=True)[0], False)
    engine = Engine(talk.worker.engine.model, blocks=200)
    one = engine.add(prompt, how or Sampling(), most_new, talk.stops, text=TextStream(talk.tokenizer))
    engine.run()
    return one.text.text


def said(talk):
    text = talk.out.getvalue()
    talk.out.seek(0), talk.out.truncate()
    return text


def test_a_conversation_has_its_history(talk, tmp_path):
    first = [{"role": "user", "content": "the fox"}]
    talk.line("the fox")
    answer = alone(talk, first)
    assert said(talk) == answer + "\n"
    talk.line("and the dog?")
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "and the dog?"}]
    last = alone(talk, second)
    assert said(talk) == last + "\n"
    talk.line(f"/save {tmp_path}/talk.jsonl")
    row = json.loads((tmp_path / "talk.jsonl").read_text())
    assert row == {"messages": [*second, {"role": "assistant", "content": last}]}
    talk.line("/system be brief")
    talk.line("the fox")
    assert said(talk) == alone(talk, [{"role": "system", "content": "be brief"}, *first]) + "\n"
    talk.line("/reset")
    talk.line("the fox")
    assert said(talk) == alone(talk, [{"role": "system", "content": "be brief"}, *first]) + "\n"
    assert not talk.line("/quit")


def test_settings_change_the_next_answer(talk):
    first = [{"role": "user", "content": "the fox"}]
    for line in ("/set temperature 0.9", "/set seed 7", "/set max_tokens 5", "/set top_k 20"):
        talk.line(line)
    talk.line("the fox")
    assert said(talk) == alone(talk, first, Sampling(temperature=0.9, seed=7, top_k=20), 5) + "\n"
    talk.line("/reset")
    talk.line("the fox")  # the second answer has the next seed
    assert said(talk) == alone(talk, first, Sampling(temperature=0.9, seed=8, top_k=20), 5) + "\n"
    talk.line("/set temperature 0")
    talk.line("/set adapter law")
    talk.line("/reset")
    talk.line("the fox")
    with_adapter = said(talk)
    talk.line("/set adapter none")
    talk.line("/reset")
    talk.line("the fox")
    assert said(talk) == alone(talk, first, most_new=5) + "\n" != with_adapter
    talk.line("/settings")
    assert "max_tokens 5" in talk.notes.file.getvalue()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("/rest", "/reset"), ("/set", "name and a value"), ("/set top_q 1", "top_p"), ("/set top_p 2", "at most 1"),
        ("/set temperature x", "number"), ("/set adapter verse", "--adapter"), ("/set max_tokens 0", "at least 1"),
        ("/save", "jsonl"), ("/save talk.jsonl", "nothing"), ("x" * 3000, "/reset"), ("/set seed -1", "seed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_changes_nothing(talk, line, what):
    before = vars(talk.settings).copy()
    with pytest.raises(UserError, match=what):
        talk.line(line)
    assert vars(talk.settings) == before
    converse(talk, iter([line, "the fox"]))
    assert what in talk.notes.file.getvalue().replace("\n", " ")
    assert said(talk).endswith(alone(talk, [{"role": "user", "content": "the fox"}]) + "\n")


def test_ctrl_c_ends_the_answer_and_keeps_its_text(talk):
    talk.line("/set max_tokens 200")
    written = talk.write

    def write(text):
        written(text)
        if len(talk.out.getvalue()) > 10:
            talk.write = written
            raise KeyboardInterrupt

    talk.write = write
    talk.line("the fox")
    text = said(talk)
    assert 10 < len(text) < 100
    assert talk.messages[-1] == {"role": "assistant", "content": text.removesuffix("\n")}
    talk.line("/set max_tokens 5")
    talk.line("more")
    assert said(talk)


def test_a_failed_engine_is_an_error(talk):
    talk.worker.engine.step = lambda: 1 / 0
    for _ in range(2):
        with pytest.raises(UserError, match="engine has stopped"):
            talk.line("the fox")
    talk.worker.engine.scheduler.remove(talk.worker.engine.scheduler.waiting[0])


def test_control_characters_do_not_reach_a_terminal():
    assert "a\x1b[2J\x07\x9b\tb\n".translate(CONTROLS) == "a[2J\tb\n"


def test_the_whole_input_may_be_one_message(talk, monkeypatch, capsys):
    found = talk.worker, talk.tokenizer, "small", talk.stops
    monkeypatch.setattr("finetune.serve.started", lambda *_, **__: found)
    text = "/reset\nthe fox\n"
    for given, what in ((text, None), ("\n", "empty")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        with contextlib.nullcontext() if what is None else pytest.raises(UserError, match=what):
            chat("x", system=None, whole=True, console=talk.notes, settings={"temperature": 0.0, "max_tokens": 12})
    assert capsys.readouterr().out == alone(talk, [{"role": "user", "content": text.strip()}]) + "\n"


@pytest.mark.slow
def test_the_command(tokenizer, tmp_path):
    """From a pipe, line by line, up to an error; in a terminal of 80 columns, with Ctrl-C."""
    model = llama(vocab_size=tokenizer.vocab_size, max_length=16_384)
    with torch.no_grad():  # it never ends an answer
        model.head_weight[tokenizer.eos_id] = 0
    save.model(model, tmp_path / "small", tokenizer)
    words = [sys.executable, "-m", "finetune", "chat", "--model", str(tmp_path / "small"), "--threads", "1",
             "--temperature", "0", "--max-tokens", "9", "--cache-tokens", "16384", "--dtype", "float32"]  # fmt: skip
    given = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
    lines = subprocess.run(words, input="the fox\n\n/reset\nthe fox\n/nothing\nthe fox\n", **given)
    assert lines.stdout.strip()
    assert lines.stdout == 2 * lines.stdout[: len(lines.stdout) // 2]
    assert "cut after 9 tokens" in lines.stderr
    assert (lines.returncode, lines.stderr.splitlines()[-1][:27]) == (2, "error: there is no command ")

    words[words.index("9")] = "15000"
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell started the tests in the background
        os.chdir(ROOT)
        os.execvpe(sys.executable, words, os.environ | {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"})
    shown = ""

    def until(pattern):
        nonlocal shown
        end = time.time() + 60
        while not re.search(pattern, shown, re.DOTALL):
            assert time.time() < end, shown
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")

    try:
        until("small.*> ")
        assert max(map(len, shown.splitlines())) <= 80
        os.write(terminal, b"the \\\nfox\n")
        until(r"fox\r\n.{20}")
        os.write(terminal, b"\x03")
        until("stopped, .*tokens/s.*> ")
        shown = ""
        os.write(terminal, b"/help\n")
        until("/quit.*> ")
        assert max(map(len, shown.splitlines())) <= 80
        os.write(terminal, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    finally:
        os.close(terminal)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
