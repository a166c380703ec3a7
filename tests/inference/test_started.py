"""What `serve` and `chat` start: the weights and the cache that their options name, and the room that these need."""

import io

import pytest
import torch
from rich.console import Console
from small_gguf import write
from small_served import adapter, llama

from finetune.chat import BASE, answers
from finetune.errors import UserError
from finetune.inference.generate import generate
from finetune.inference.packed import pack, packed_weights, weight_bytes
from finetune.inference.sampler import Sampling
from finetune.lm.io import load, save
from finetune.lm.tokenizer import Tokenizer
from finetune.ops import use_backend
from finetune.runs import machine
from finetune.serve import started

TEXT = "the quick brown fox jumps over the lazy dog <|im_start|>user assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = Tokenizer.train([TEXT] * 3, vocab_size=300)
    folder = tmp_path_factory.mktemp("model")
    save.model(llama(vocab_size=tokenizer.vocab_size), folder, tokenizer)
    return folder


def formats_of(source, **options):
    """The packed formats, the dtype of activations and that of the cache; and it answers."""
    threads = torch.get_num_threads()
    worker, tokenizer, _, _ = started(str(source), cache_tokens=256, console=Console(quiet=True), **options)
    try:
        sequence, engine = None, worker.engine
        found = {w.format for _, w in packed_weights(engine.model)}
    finally:
        worker.stop()
        worker.join(10)
        torch.set_num_threads(threads)
    sequence = engine.add(tokenizer.encode("the quick"), Sampling(), 3)
    engine.run()
    assert len(sequence.answer) == 3
    return found, engine.model.norm.weight.dtype, engine.cache.layers[0][0][0].dtype


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ({"fp32"}, torch.float32, torch.float32)),
        ({"dtype": "bfloat16"}, ({"bf16"}, torch.bfloat16, torch.bfloat16)),
        ({"quantize": "bf16"}, ({"bf16"}, torch.bfloat16, torch.bfloat16)),
        ({"quantize": "int8", "cache": "int8"}, ({"int8"}, torch.bfloat16, torch.int8)),
        ({"quantize": "int4", "dtype": "float32"}, ({"int4", "int8"}, torch.float32, torch.float32)),
        ({"quantize": "nf4", "cache": "fp8"}, ({"nf4", "int8"}, torch.bfloat16, torch.float8_e4m3fn)),
        ({"dtype": "float32", "cache": "bf16"}, ({"fp32"}, torch.float32, torch.bfloat16)),
    ],
)
def test_options(folder, options, wanted):
    assert formats_of(folder, **options) == wanted


def test_adapters_are_batch_invariant_if_they_are_to_be(folder, tmp_path):
    made = adapter(tmp_path, model=load.llama(folder))
    for wanted in (False, True):
        threads = torch.get_num_threads()
        worker, *_ = started(str(folder), cache_tokens=256, adapter=(f"law={made}",), batch_invariant=wanted,
                             console=Console(quiet=True))  # fmt: skip
        worker.stop()
        torch.set_num_threads(threads)
        assert {bool(stack.packed) for stack in worker.engine.adapters.stacks.values()} == {wanted}
        assert worker.engine.cache.native


def test_a_files_own_types(folder, tmp_path):
    tokenizer = load.tokenizer(folder)
    path = write(tmp_path / "m.gguf", load.llama(folder), "Q4_0", tokenizer=tokenizer, pre="smollm",
                 extra={"tokenizer.chat_template": tokenizer.chat_template})  # fmt: skip
    assert formats_of(path, quantize="file") == ({"int4"}, torch.bfloat16, torch.bfloat16)
    assert formats_of(path, quantize="int8") == ({"int8"}, torch.bfloat16, torch.bfloat16)
    with pytest.raises(UserError, match=r"--quantize file serves a \.gguf file"):
        formats_of(folder, quantize="file")


def test_generate_packs_too(folder):
    tokenizer, threads = load.tokenizer(folder), torch.get_num_threads()
    model = pack(load.llama(folder), "int4")
    wanted = tokenizer.decode(generate(model, [tokenizer.encode("the quick")], 5)[0])
    given = {"chat": False, "max_new_tokens": 5, "quantize": "int4"}
    assert answers(str(folder), ["the quick"], **given) == {BASE: [wanted]}
    with pytest.raises(UserError, match="--quantize packs the weights of one model"):
        answers(str(folder), ["the quick"], adapters=[str(folder)], compare=True, **given)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("backend", "said"), [(None, ""), ("reference", "the backend reference is forced")])
def test_it_says_why_no_native_call_computes_the_steps(folder, backend, said):
    threads, console = torch.get_num_threads(), Console(file=io.StringIO(), width=200)
    with use_backend(backend):
        worker, *_ = started(str(folder), cache_tokens=256, console=console)
    worker.stop()
    torch.set_num_threads(threads)
    printed = console.file.getvalue()
    assert said in printed
    assert ("not the native call" in printed) == bool(said)


def test_what_does_not_fit_is_refused_before_it_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(load, "llama", lambda *_: pytest.fail("the weights were loaded"))
    model = 4 * sum(p.numel() for p in llama(vocab_size=load.config(folder).vocab_size).parameters())
    cache = 2 * 2 * 2 * 8 * 256  # keys and values, layers, heads, numbers, tokens
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: model - 1)
    with pytest.raises(UserError, match=r"needs .* KiB .* for --cache-tokens 256\), .* free: use fewer tokens or bits"):
        formats_of(folder, quantize="int4")
    monkeypatch.undo()
    threads = torch.get_num_threads()
    worker, *_ = started(str(folder), cache_tokens=256, dtype="float32", console=Console(quiet=True))
    worker.stop()
    torch.set_num_threads(threads)
    need = weight_bytes(worker.engine.model) + worker.engine.cache.nbytes
    assert worker.engine.cache.nbytes == 4 * cache
    for room, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(machine, "available_memory_bytes", lambda room=room: room)
        if fits:
            formats_of(folder, dtype="float32")
        else:
            with pytest.raises(UserError, match="by the formulas"):
                formats_of(folder, dtype="float32")
