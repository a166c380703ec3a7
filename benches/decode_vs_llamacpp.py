"""Decoding and prefill: ours, llama.cpp and transformers on the same weights and threads, side by side in one process.

    python -m finetune bench decode_vs_llamacpp [--model FILE.gguf] [--batch 1 8] [--rounds 7] [--steps 12]
        [--formats bf16 int8 int4] [--against llama.cpp transformers] [--threads N] [--json FILE] [--keep]

Ours runs in its own formats next to llama.cpp's of the same width: bf16 and BF16, int8 and Q8_0, which llama.cpp's own
quantizer makes of --model (SmolLM2 by default). For int4 both open its Q4_0 file. transformers generates in bf16. The
sides take turns: a round is a prompt, not timed, and then --steps greedy tokens for each of --batch sequences; or a
prompt of --prefill tokens, timed. A ratio is the median over the rounds (above 1: ours is faster); rounds in which
other processes had more than a quarter of a core are repeated. `of limit`: bytes that a step reads (weights, keys and
values) / the bandwidth of reading that is measured in the same run. Unless the sides predict nearly the same
distribution of the first token, nothing is timed. `make decode` builds llama.cpp for this machine first.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import inspect
import mmap
import os
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import harness
import numpy as np
import torch
from rich.progress import Progress
from timing import Times, best

from finetune.errors import UserError
from finetune.inference.engine import Engine
from finetune.inference.packed import from_gguf, pack, read_bytes
from finetune.inference.sampler import Sampling
from finetune.lm.io import hub, load, save, smollm2
from finetune.lm.io.gguf import GGUFModel
from finetune.lm.io.gguf_file import GGUFFile
from finetune.runs import display, machine, wheels

# Our format → llama.cpp's, its number of it (llama_ftype), and the largest divergence (nats) of the first token.
FORMATS = {"bf16": ("BF16", 32, 0.05), "int8": ("Q8_0", 7, 0.05), "int4": ("Q4_0", 2, 0.05)}
PROMPT = 32  # tokens before the timed ones
BLOCK = 16
QUIET = 0.25  # of a core that other processes may have in a round
MANY = 16  # sequences, whose throughput is compared with that of one
OURS, LLAMA, TRANSFORMERS = "ours", "llama.cpp", "transformers"


class Side(Protocol):
    """A program with a model. `nbytes`: of the weights that a step reads; `element`: of a key or a value."""

    nbytes: int
    element: int

    def logits(self, prompt: list[int]) -> torch.Tensor:
        """(V,) of the token behind a prompt."""

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds a step of one greedy token for each prompt, after the prompts are computed."""

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the token behind a prompt is known."""


# --- the sides


class Ours:
    """The engine, with the model in one of its formats."""

    def __init__(self, model: Any, sequences: int, tokens: int) -> None:
        self.model, self.most = model, sequences
        blocks = sequences * -(-tokens // BLOCK) + 1
        self.engine = Engine(model, blocks, BLOCK, most_tokens=512, most_sequences=sequences, prefix_cache=False)
        self.nbytes = read_bytes(model)
        self.element = self.engine.cache.layers[0][0][0].element_size()

    def logits(self, prompt: list[int]) -> torch.Tensor:
        found: list[torch.Tensor] = []
        sequence = self.engine.add(prompt, Sampling(), 1)

        def receive(sequence: Any, logits: torch.Tensor) -> None:
            found.append(logits.float())
            self.engine.end(sequence)

        sequence.receive = receive
        self.engine.run()
        return found[0]

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        sequences = [self.engine.add(prompt, Sampling(), steps + 2) for prompt in prompts]
        while any(not one.answer for one in sequences):
            self.engine.step()
        began = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        seconds = time.perf_counter() - began
        for one in sequences:
            if not one.finish_reason:
                self.engine.end(one)
        return seconds / steps

    def prefill(self, prompt: list[int]) -> float:
        self.engine.add(prompt, Sampling(), 1)
        began = time.perf_counter()
        self.engine.run()
        return time.perf_counter() - began


class LlamaCpp:
    """llama.cpp, by its C interface: nothing of Python but the batch and the choice of the likeliest token."""

    element = 2

    def __init__(self, path: Path, sequences: int, tokens: int, threads: int) -> None:
        lib = self.lib = llama_cpp()
        info = GGUFFile(path).tensor_infos
        embedding_only = info["token_embd.weight"].nbytes if "output.weight" in info else 0
        self.nbytes = sum(one.nbytes for one in info.values()) - embedding_only
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = sequences * tokens, 512, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = sequences, threads, threads
        params.kv_unified = True
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.model or not self.context:
            raise UserError(f"llama.cpp does not open {path}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(max(512, sequences), 0, 1)

    def run(self, work: list[tuple[int, int, int]], wanted: list[int]) -> list[torch.Tensor]:
        """One decode of (token, position, sequence) in work; the logits (V,) of the places in `wanted`."""
        batch = self.batch
        batch.n_tokens = len(work)
        for i, (token, position, sequence) in enumerate(work):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = 0
        for i in wanted:
            batch.logits[i] = 1
        if self.lib.llama_decode(self.context, batch):
            raise UserError("llama.cpp cannot decode the batch")
        rows = [self.lib.llama_get_logits_ith(self.context, i) for i in wanted]
        return [torch.from_numpy(np.ctypeslib.as_array(row, (self.vocabulary,))) for row in rows]

    def start(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """The logits behind each prompt; what was there before is gone."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        found = []
        for number, prompt in enumerate(prompts):
            work = [(token, at, number) for at, token in enumerate(prompt)]
            found += [row.clone() for row in self.run(work, [len(work) - 1])]
        return found

    def logits(self, prompt: list[int]) -> torch.Tensor:
        return self.start([prompt])[0]

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        tokens = [int(row.argmax()) for row in self.start(prompts)]
        began = time.perf_counter()
        for step in range(steps):
            work = [(token, len(prompts[i]) + step, i) for i, token in enumerate(tokens)]
            tokens = [int(row.argmax()) for row in self.run(work, list(range(len(work))))]
        return (time.perf_counter() - began) / steps

    def prefill(self, prompt: list[int]) -> float:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        began = time.perf_counter()
        int(self.run([(token, at, 0) for at, token in enumerate(prompt)], [len(prompt) - 1])[0].argmax())
        return time.perf_counter() - began


class Transformers:
    """transformers' generate in bf16, with its default cache."""

    element = 2

    def __init__(self, source: Path) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise UserError("transformers is not installed: pip install -e '.[peers]'") from None
        with tempfile.TemporaryDirectory() as folder:
            if source.suffix == ".gguf":
                save.model(load.model(source), Path(folder), load.tokenizer(source))
            place = folder if source.suffix == ".gguf" else source
            self.model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).eval()
        self.nbytes = sum(p.nbytes for p in self.model.parameters())
        if not self.model.config.tie_word_embeddings:
            self.nbytes -= self.model.get_input_embeddings().weight.nbytes

    @torch.no_grad()
    def logits(self, prompt: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([prompt])).logits[0, -1].float()

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        clock: list[float] = []

        def tick(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            clock.append(time.perf_counter())
            return scores

        rows = torch.tensor(prompts)
        self.model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=steps + 1, min_new_tokens=steps + 1,
            do_sample=False, pad_token_id=0, logits_processor=[tick],
        )  # fmt: skip
        return (clock[-1] - clock[0]) / steps

    @torch.no_grad()
    def prefill(self, prompt: list[int]) -> float:
        began = time.perf_counter()
        int(self.model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].argmax())
        return time.perf_counter() - began


def llama_cpp() -> Any:
    """The bindings, silenced."""
    try:
        from llama_cpp import llama_cpp as lib
    except ImportError:
        raise UserError(
            "llama-cpp-python is not installed: make decode installs it, or --against transformers"
        ) from None
    log = lib.llama_log_callback(lambda *_: None)
    llama_cpp.kept = log  # type: ignore[attr-defined]  # C keeps only its address
    lib.llama_log_set(log, ctypes.c_void_p(0))
    return lib


def features() -> list[str]:
    """The instructions that llama.cpp was built with."""
    told = llama_cpp().llama_print_system_info().decode()
    return [part.split("=")[0].split(":")[-1].strip() for part in told.split("|") if part.rstrip().endswith("= 1")]


def requantized(source: Path, name: str, ftype: int, folder: Path) -> Path:
    """`source` as llama.cpp's quantizer writes it in one of its types, made once."""
    made = folder / f"{source.stem}.{name}.gguf"
    if not made.exists():
        lib = llama_cpp()
        folder.mkdir(parents=True, exist_ok=True)
        params = lib.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = ftype, True
        partial = made.with_suffix(".part")
        if lib.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)):
            raise UserError(f"llama.cpp does not write {source} as {name}")
        partial.replace(made)
    return made


# --- what is measured


def read_rate() -> float:
    """Bytes a second at which the threads read memory that no cache holds, in huge pages where the system has them."""
    room = mmap.mmap(-1, 1 << 29)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    numbers = torch.frombuffer(room, dtype=torch.float32)
    numbers.fill_(1.0)
    return numbers.nbytes / best(numbers.sum, lambda: None, 1.0)


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """KL(theirs ‖ ours) in nats of two rows of logits (V,)."""
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each side in each round, and how much of a core other processes had at most. Rounds in which they had
    more than QUIET are repeated, up to twice as many; then the quietest count. The first warms up and is dropped."""
    found: list[tuple[float, dict[str, float]]] = []
    for number in range(3 * rounds + 1):
        began, before = time.perf_counter(), others()
        order = list(sides) if number % 2 else list(reversed(list(sides)))
        seconds = {name: sides[name]() for name in order}
        found.append(((others() - before) / (time.perf_counter() - began), seconds))
        if sum(share <= QUIET for share, _ in found[1:]) == rounds:
            break
    kept = sorted(found[1:], key=lambda one: one[0])[:rounds]
    return {name: [seconds[name] for _, seconds in kept] for name in sides}, kept[-1][0]


def others() -> float:
    """Seconds of CPU that other processes have had since the machine started; 0 where the system does not say."""
    try:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def rows(
    what: str,
    format: str,
    tokens: int,
    seconds: dict[str, list[float]],
    read: dict[str, float],
    rate: float,
    noise: float,
) -> list[dict[str, Any]]:
    """A row of the report for each side. `tokens`: made in a round's step; `read`: bytes that it reads, at least."""
    found = []
    for name, values in seconds.items():
        ratios = [theirs / own for own, theirs in zip(seconds[OURS], values, strict=True)]
        found.append({
            "cell": {"what": what, "format": format, "side": name},
            "tokens_per_second": tokens / statistics.median(values),
            "ratio": dataclasses.asdict(Times.of(ratios)),
            "others": noise,
            "of_limit": read[name] / rate / statistics.median(values),
        })  # fmt: skip
    return found


def measure(wanted: argparse.Namespace, report: Callable[[str], None]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of the report, and the measured limits and divergences."""
    source = hub.resolve(wanted.model)
    file = source if source.suffix == ".gguf" else wheels.cache_dir() / Path(smollm2.MEMBER).name
    if source.is_dir() and wanted.model != "smollm2":
        raise UserError(f"--model {wanted.model}: give a .gguf file, of which llama.cpp makes its own types")
    config, longest = load.config(source), max(wanted.prefill, PROMPT + wanted.steps + 2)
    if longest > config.max_length:
        raise UserError(f"the model has {config.max_length} positions, {longest} are needed: a smaller --prefill")
    text = load.tokenizer(source).encode(inspect.getsource(textwrap) * 4)
    prompts = [text[i * 100 : i * 100 + PROMPT] for i in range(max(*wanted.batch, MANY))]
    rate = read_rate()
    found, facts = [], {"read_bytes_per_second": rate}
    peer = Transformers(source) if TRANSFORMERS in wanted.against else None
    for format in wanted.formats:
        report(f"load {format}")
        path = requantized(file, *FORMATS[format][:2], Path(wanted.files)) if LLAMA in wanted.against else None
        if path and format == "int4":
            model: Any = from_gguf(GGUFModel(path))
        else:
            model = pack(load.model(source, torch.bfloat16).eval(), format)
        sides: dict[str, Side] = {OURS: Ours(model, len(prompts), longest)}
        if path:
            sides[LLAMA] = LlamaCpp(path, max(wanted.batch), longest, wanted.threads)
        if peer and format == "bf16":
            sides[TRANSFORMERS] = peer
        facts |= compared(sides, prompts[:4], format)
        kept = 2 * config.layers * config.kv_heads * config.head_dim * (PROMPT + wanted.steps / 2)  # numbers a row
        for batch in wanted.batch:
            report(f"{format}, batch {batch}")
            calls = {name: partial(side.decode, prompts[:batch], wanted.steps) for name, side in sides.items()}
            read = {name: side.nbytes + batch * kept * side.element for name, side in sides.items()}
            seconds, noise = turns(calls, wanted.rounds)
            found += rows(f"batch {batch}", format, batch, seconds, read, rate, noise)
        report(f"{format}, batch {MANY}")
        calls = {str(count): partial(sides[OURS].decode, prompts[:count], wanted.steps) for count in (1, MANY)}
        seconds, _ = turns(calls, wanted.rounds)
        ratios = [MANY * one / many for one, many in zip(seconds["1"], seconds[str(MANY)], strict=True)]
        facts[f"{format}: throughput of batch {MANY} over batch 1"] = statistics.median(ratios)
        report(f"{format}, prefill")
        calls = {name: partial(side.prefill, text[: wanted.prefill]) for name, side in sides.items()}
        read = {name: float(side.nbytes) for name, side in sides.items()}
        seconds, noise = turns(calls, wanted.rounds)
        found += rows(f"prefill {wanted.prefill}", format, wanted.prefill, seconds, read, rate, noise)
    return found, facts


def compared(sides: dict[str, Side], prompts: list[list[int]], format: str) -> dict[str, float]:
    """The divergence of each other side; UserError if one is too large for the same weights."""
    found, most = {}, FORMATS[format][2]
    own = [sides[OURS].logits(prompt) for prompt in prompts]
    for name, side in sides.items():
        if name != OURS:
            gap = statistics.mean(divergence(row, side.logits(one)) for row, one in zip(own, prompts, strict=True))
            found[f"{format}: divergence from {name}, nats"] = gap
            if not gap < most:
                raise UserError(f"not timed: {format} of ours and {name} differ by {gap:.3f} nats, over {most}")
    return found


# --- the report


def show(found: list[dict[str, Any]], facts: dict[str, float], about: dict[str, Any], console: Any) -> None:
    lines: list[Any] = []
    for r in found:
        what, format, side = r["cell"].values()
        name = FORMATS[format][0] if side == LLAMA else format
        ratio = r["ratio"]
        other = "" if side == OURS else f"{ratio['median']:.2f}×"
        spread = "" if side == OURS else f"{ratio['p20']:.2f} … {ratio['p80']:.2f}"
        share = f"{r['of_limit']:.0%}" if what.startswith("batch") else ""
        lines.append([what, side, name, f"{r['tokens_per_second']:,.1f}", other, spread, share])
    heads = ("what", "side", "weights", ">tokens/s", ">ours is faster", ">20 … 80 %", ">of limit")
    display.table(console, heads, lines, f"{about['cpu']} · {about['level']} · {about['threads']} threads")
    if (noise := max(r["others"] for r in found)) > QUIET:
        display.say(console, f"other processes had up to {noise:.1f} cores in the rounds that count", "yellow")
    for name, value in facts.items():
        shown = f"{value / 1e9:.1f} GB/s" if name.endswith("per_second") else f"{value:.3g}"
        console.print(f"{name.replace('_', ' ')}: {shown}")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m finetune bench decode_vs_llamacpp", description=(__doc__ or "").split("\n")[0]
    )
    p.add_argument("--model", default="smollm2", help="a .gguf file")
    p.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="our formats (all)")
    p.add_argument("--against", nargs="*", choices=(LLAMA, TRANSFORMERS), default=[LLAMA, TRANSFORMERS], help="(both)")
    p.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sequences at once (1 8)")
    p.add_argument("--prefill", type=int, default=512, help="tokens of the long prompt (512)")
    p.add_argument("--steps", type=int, default=12, help="timed tokens of a sequence a round (12)")
    p.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    p.add_argument("--threads", type=int, default=machine.physical_cores(), help="of each side (the cores)")
    p.add_argument("--files", default=str(wheels.cache_dir() / "bench"), help="folder of llama.cpp's files (the cache)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    p.add_argument("--keep", action="store_true", help="also write them to benches/results/decode/<machine>.json")
    wanted = p.parse_args(argv)
    if min(*wanted.batch, wanted.prefill, wanted.steps, wanted.rounds, wanted.threads) < 1 or wanted.prefill > 512:
        p.error("--batch, --steps, --rounds, --threads must be at least 1, --prefill between 1 and 512")
    torch.set_num_threads(wanted.threads)
    console = display.console()
    try:
        with Progress(console=display.console(stderr=True), transient=True) as progress:
            bar = progress.add_task("read", total=None)
            found, facts = measure(wanted, lambda text: progress.update(bar, description=text))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = harness.header() | {"threads": wanted.threads}
    if LLAMA in wanted.against:
        about["llama.cpp"] = features()
        if about["level"] != "avx2" and "AVX512" not in about["llama.cpp"]:
            display.say(console, "llama.cpp lacks AVX-512, which this machine has: make decode builds it", "yellow")
    show(found, facts, about, console)
    report = {"machine": about, "results": found, "facts": facts}
    for path in [wanted.json] * bool(wanted.json) + [
        harness.KEPT / "decode" / f"{harness.slug(about)}.json"
    ] * wanted.keep:
        harness.write_report(path, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
