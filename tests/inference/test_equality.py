"""One matrix: whatever the engine does with a request, its tokens are the same, and in batch-invariant mode the bits of
its log-probabilities too; and the drift of the default mode."""

import functools
import itertools
import random
from collections import Counter

import pytest
import torch
from small_served import adapter, llama, prompts

from finetune import ops
from finetune.errors import UserError
from finetune.inference.drift import drift
from finetune.inference.engine import Engine
from finetune.inference.packed import pack
from finetune.inference.quantize import quantize
from finetune.inference.sampler import Sampling
from finetune.inference.speculative import DraftModel
from finetune.lm.gpt import GPT, GPTConfig
from finetune.ops.kv_cache import quantize as quantized_cache

BLOCK, NEW = 4, 4
HOW = [Sampling(logprobs=2), Sampling(temperature=0.8, top_p=0.9, seed=3, logprobs=2)]
LENGTHS = (8, 4, 9, 7, 12, 3, 1, 8)  # of exactly n blocks, one token less and one more; the first and last are the same
REQUESTS = [([(7 * (i % 7) + 3 * j * j) % 97 for j in range(length)], HOW[i % 2]) for i, length in enumerate(LENGTHS)]
SPECULATION = ("off", "copied", "drawn")
PREEMPTION = ("never", "once", "again and again")


@functools.cache
def packed(format="fp32"):
    model = llama()
    return pack(model.bfloat16() if format == "bf16" else model, format)


def started(kind, blocks, **limits):
    """An engine of a kind of model: "dense", whose torch products depend on the batch, or packed weights of a format,
    computed by the native step or ("by modules") one op after another."""
    format, _, by_modules = kind.partition(" ")
    model = llama() if kind == "dense" else packed(format)
    engine = Engine(model, blocks, BLOCK, batch_invariant=kind != "dense", **limits)
    assert kind == "dense" or engine.cache.native
    if by_modules:
        engine.cache.native = None
    return engine


def bits(one):
    """Tokens, and log-probabilities of the chosen and the two most likely ones; equal floats are equal bits."""
    return one.answer, [(each.chosen, each.top) for each in one.logprobs]


@functools.cache
def alone(kind):
    """Each request in an engine of its own, the prompt in one piece, nothing cached or guessed."""
    found = []
    for prompt, how in REQUESTS:
        engine = started(kind, 200, prefix_cache=False)
        found.append(engine.add(prompt, how, NEW))
        engine.run()
    return [bits(one) for one in found]


class Copied:
    """Guesses the two next tokens of the known answer, every third time with the first wrong."""

    def __init__(self, kind):
        self.known, self.times = alone(kind), 0

    def propose(self, sequences):
        for one in sequences:
            self.times += 1
            answer, _ = self.known[REQUESTS.index((one.prompt, one.how))]
            one.guesses, one.guessed_from = answer[len(one.answer) :][:2], None
            if self.times % 3 == 0 and one.guesses:
                one.guesses[0] = 99 - one.guesses[0]

    def forget(self, sequence):
        pass


@functools.cache
def another():
    return llama(tied=False)


def drafter(speculation, kind):
    """The draft of "drawn" is another model: most guesses are rejected. Sampling with it draws other tokens, of the
    same distribution (test_speculative.py); so it guesses for greedy requests only."""
    if speculation == "copied":
        return Copied(kind)
    return DraftModel(another(), 60, BLOCK, count=2) if speculation == "drawn" else None


def asked(engine, batch, chosen, preempt):
    """The requests `chosen`, at most `batch` at once, a running sequence preempted as `preempt` says."""
    rng, found, todo = random.Random(1), [], list(chosen)
    while todo or engine.busy:
        while todo and len(engine.scheduler.running) + len(engine.scheduler.waiting) < batch:
            prompt, how = REQUESTS[todo.pop(0)]
            found.append(engine.add(prompt, how, NEW))
        engine.step()
        running = engine.scheduler.running
        if preempt == "again and again" and engine.changed and running:  # each has a new token by then
            engine.scheduler.preempt(rng.choice(running))
        if preempt == "once" and running and not running[-1].preempted and running[-1].answer:
            engine.scheduler.preempt(running[-1])
    assert (engine.pool.used, set(engine.pool.references)) == (0, {0})
    return [bits(one) for one in found], sum(one.preempted for one in found)


KINDS = ("dense", "fp32", "bf16", "fp32 by modules")
CASES = itertools.product(KINDS, (1, 7, BLOCK - 1, BLOCK, BLOCK + 1), (1, 8))


@pytest.mark.parametrize(("kind", "chunk", "batch"), [*CASES, ("int4", 7, 8), ("int8 by modules", BLOCK + 1, 8)])
def test_tokens_and_log_probability_bits_are_those_of_the_request_alone(kind, chunk, batch):
    """cache cold and warm × no, forced and repeated preemption × speculation off, copied and drawn. Tokens alone with
    dense weights, which have no batch-invariant mode."""
    proposed, accepted = Counter(), Counter()
    for speculation, preempt in itertools.product(SPECULATION, PREEMPTION):
        greedy = [i for i, (_, how) in enumerate(REQUESTS) if speculation != "drawn" or not how.temperature]
        chosen = greedy[: max(batch, 3)]
        engine = started(kind, 60, most_tokens=chunk + batch - 1, drafter=drafter(speculation, kind))
        for cache in ("cold", "warm"):
            before = engine.scheduler.hits
            found, preempted = asked(engine, batch, chosen, preempt)
            wanted = [alone(kind)[i] for i in chosen]
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted], (speculation, preempt, cache)
            assert kind == "dense" or found == wanted, (speculation, preempt, cache)
            assert (preempted > 0) == (preempt != "never")
        assert engine.scheduler.hits - before >= 12  # the warm pass found the prompts' blocks
        proposed[speculation] += engine.proposed
        accepted[speculation] += engine.accepted
    if chunk + batch > 2:  # else the budget of a step has no room for guesses
        assert (proposed["off"], proposed["drawn"] > 0) == (0, True)
        assert 0 < accepted["copied"] < proposed["copied"]


def test_adapters_too(tmp_path):
    """Requests of two adapters and the base in one batch, to the bit what each gets alone."""
    folders = {"a": adapter(tmp_path / "a", 0), "b": adapter(tmp_path / "b", 1, rank=3, targets=("q", "up", "head"))}
    asked = [(prompt, how, (None, "a", "b")[i % 3]) for i, (prompt, how) in enumerate(REQUESTS)]

    def answers(batch):
        found = []
        for i in range(0, len(asked), batch):
            engine = started("fp32", 200, adapters=folders, most_tokens=7 + batch)
            found += [engine.add(prompt, how, NEW, adapter=name) for prompt, how, name in asked[i : i + batch]]
            engine.run()
        return [bits(one) for one in found]

    assert answers(1) == answers(8) == answers(3)
    assert answers(1)[1] != alone("fp32")[1]


def test_the_drift_of_the_default_mode_is_measured_and_none_is_left_in_the_other():
    asked = prompts(12)
    default = drift(lambda: Engine(llama(), 300), asked, 12, (3, 12))
    assert [one.company for one in default] == [3, 12]
    assert all(0 < one.largest < 1e-4 and one.same_bits < 0.9 for one in default)
    assert all(one.tokens > 100 and 0 <= one.answers < 4 for one in default)
    fixed = drift(lambda: Engine(packed(), 300, batch_invariant=True), asked, 12, (3, 12))
    assert [(one.answers, one.tokens, one.same_bits, one.largest) for one in fixed] == [(0, 144, 1.0, 0.0)] * 2


def test_what_depends_on_the_batch_is_refused_by_name(monkeypatch):
    gpt = GPT(GPTConfig(vocab_size=100, dim=32, layers=2, heads=4, max_length=128))
    for model, what in ((llama(), r"blocks.0.attn.q is not packed"), (gpt, "not packed")):
        with pytest.raises(UserError, match=what):
            Engine(model, 9, batch_invariant=True)
    Engine(pack(gpt.eval(), "fp32"), 9, batch_invariant=True)
    monkeypatch.setattr("finetune.inference.invariance.ops.quantized_linear.why_not", lambda *_: "it is not built")
    with pytest.raises(UserError, match="it is not built"):
        Engine(packed(), 9, batch_invariant=True)


def pieces(x, function):
    """function of rows, all at once and in pieces of any size."""
    whole = function(x)
    for start, end in ((0, 1), (1, 2), (2, 5), (3, 10), (16, 33), (len(x) - 1, len(x)), (5, len(x))):
        assert torch.equal(function(x[start:end].clone()), whole[start:end])


@pytest.mark.parametrize("width", [32, 33, 100, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_rows_bits_depend_on_the_row_alone(dtype, width):
    """In every op of a forward pass but attention."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(70, 2 * width, generator=g).to(dtype)
    scale, half = torch.rand(width, generator=g).to(dtype), x[:, :width].contiguous()
    pieces(half, lambda rows: ops.rms_norm(rows, scale))
    pieces(half, lambda rows: ops.layer_norm(rows, scale, scale))
    pieces(half, ops.gelu)
    pieces(half, lambda rows: rows + rows * 0.3)
    pieces(half, lambda rows: rows.float().log_softmax(-1))
    pieces(x, lambda rows: ops.swiglu(rows[:, :width].contiguous(), rows[:, width:].contiguous()))
    angles = torch.randn(70, width // 2, generator=g)
    turned = torch.cat([torch.arange(70.0)[:, None], x[:, : 2 * (width // 2)].float()], 1)  # its position first
    pieces(turned, lambda rows: ops.rope(rows[None, :, None, 1:].to(dtype), angles.cos(), angles.sin(),
                                         rows[None, :, 0].long())[0])  # fmt: skip
    for rows_of_weight, format in itertools.product((16, 50), ("fp32", "bf16", "int8", "int4", "nf4")):
        weight = quantize(torch.randn(rows_of_weight, width, generator=g), format).packed("cpu")
        pieces(half, lambda rows, weight=weight: ops.quantized_linear(rows, weight))


@pytest.mark.parametrize("cache", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_attentions_bits_are_the_same_for_one_query_and_for_many(dtype, cache):
    """A token as the only query, among others of its sequence, and in a batch; across the kernel's pieces of 256."""
    g = torch.Generator().manual_seed(0)
    for size, heads, kv_heads, dim, window in ((16, 9, 3, 64, 0), (4, 4, 2, 8, 0), (3, 4, 1, 16, 7)):
        count = 520 // size + 2
        k, v = (torch.randn(count, size, kv_heads, dim, generator=g).to(dtype) for _ in "kv")
        (k, k_scale), (v, v_scale) = ((x, None) if cache is None else quantized_cache(x, cache) for x in (k, v))
        table = torch.randperm(count, generator=g)[None].int()

        def attend(q, *ends, k=k, v=v, table=table, k_scale=k_scale, v_scale=v_scale, window=window):
            tables, lengths = table.repeat(len(ends), 1), torch.tensor(ends)
            return ops.paged_attention(q, k, v, tables, lengths, k_scale, v_scale, window=window)

        for length, queries in ((5, 5), (257, 20), (513, 30), (300, 300)):
            q = torch.randn(1, queries, heads, dim, generator=g).to(dtype)
            whole, first = attend(q, length), length - queries
            for i in {0, queries // 2, queries - 1}:
                for many in (1, 3, 7):
                    part = q[:, i : i + many]
                    assert torch.equal(attend(part, first + i + part.shape[1]), whole[:, i : i + many])
            assert torch.equal(attend(q.repeat(3, 1, 1, 1), queries, length, length)[2], whole[0])
