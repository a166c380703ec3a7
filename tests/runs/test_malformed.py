"""Malformed files of every kind that is read: each is taken or refused in one clear line, in bounded time and memory.

The inputs are good files, altered at random (the seed is the kind's name): values of JSON replaced by others, bytes
flipped, cut and repeated. No alteration may give a traceback, hang, or take gigabytes.
"""

import contextlib
import copy
import json
import random
import resource
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
import small_gguf
import torch
from PIL import Image
from small_gguf import TEXT

from finetune.data import rows
from finetune.diffusion import images, trained
from finetune.diffusion.process import Process
from finetune.distributed import sharded
from finetune.errors import UserError
from finetune.interview import answers, content
from finetune.interview.quiz import Schedule
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io import gguf_tokenizer, load, save, weights
from finetune.lm.io.gguf import GGUFModel
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.peft import adapters, lora
from finetune.rl.envs import logged_data
from finetune.rl.tabular import mdp
from finetune.runs import checkpoint, config, registry, run_folder
from finetune.runs.metrics import Metrics

CASES = 45  # of each kind
SECONDS = 5
ROOM = 2 << 30  # bytes of address space that a case may add
LLAMA = LlamaConfig(vocab_size=320, dim=16, layers=1, heads=2, kv_heads=1, hidden=24, max_length=64)
SHARDED = GPTConfig(vocab_size=40, dim=16, layers=1, heads=2, max_length=8)

ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, -(10**40), 0.0, -1.5, 1e-45, 1e308, 1.0000001,
    "", "x", "NaN", "../../x", "/etc/passwd", "\x00",
    "é" * 300, [], {}, [[]], [None], [1] * 50, {"a": {"a": {"a": []}}}, [[[[[[[[[]]]]]]]]],
]  # fmt: skip


def places(value, at=()):
    yield at
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*at, key))


def altered_json(rng, text):
    """The JSON with a value replaced, removed or doubled, now and then with its text damaged."""
    if rng.random() < 0.2:
        return altered_bytes(rng, text)
    whole = json.loads(text)
    for _ in range(rng.randint(1, 2)):
        at = rng.choice(list(places(whole)))
        if not at:
            whole = copy.deepcopy(rng.choice(ODD)) if rng.random() < 0.3 else whole
            continue
        try:
            owner = whole
            for key in at[:-1]:
                owner = owner[key]
            if isinstance(owner, dict) and rng.random() < 0.2:
                del owner[at[-1]]
            else:
                owner[at[-1]] = copy.deepcopy(rng.choice(ODD))
        except (KeyError, IndexError, TypeError):  # the first alteration removed it
            continue
    out = json.dumps(whole)
    if rng.random() < 0.1:
        out = out.replace("1", rng.choice(["NaN", "-Infinity", "1e999"]), 1)
    return out.encode()


def altered_bytes(rng, blob):
    blob = bytearray(blob)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(len(blob) + 1)
        how = rng.randrange(5)
        if how == 0 and blob:
            blob[at % len(blob)] ^= 1 << rng.randrange(8)
        elif how == 1:
            blob[at : at + rng.randint(1, 9)] = b""
        elif how == 2:
            blob[at:at] = rng.randbytes(rng.randint(1, 9))
        elif how == 3:
            blob[at : at + 8] = rng.choice([b"\xff" * 8, b"\x00" * 8, (2**62).to_bytes(8, "little")])
        elif rng.random() < 0.3:
            del blob[at:]
    return bytes(blob)


def altered(rng, path):
    """Alters a file in place; most alterations of binary files go into their first part, which describes the rest."""
    blob = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(altered_json(rng, blob))
    elif path.suffix in (".safetensors", ".gguf", ".npz") and rng.random() < 0.8:
        head = min(len(blob), 4000)
        path.write_bytes(altered_bytes(rng, blob[:head]) + blob[head:])
    else:
        path.write_bytes(altered_bytes(rng, blob))


# --- the kinds: a function that writes good files into a folder, and one that reads them


def tokenizer():
    return Tokenizer.train([TEXT], vocab_size=LLAMA.vocab_size)


def llama():
    torch.manual_seed(0)
    return Llama(LLAMA)


def write_llama(folder):
    save.model(llama(), folder, tokenizer())


def write_gpt(folder):
    torch.manual_seed(0)
    save.model(GPT(GPTConfig(vocab_size=64, dim=16, layers=1, heads=2, max_length=32)), folder)


def write_adapter(folder):
    model = llama()
    lora.apply_lora(model, 2, 4.0, 0.0, ["q", "v"])
    adapters.save_adapter(model, folder, "somewhere")


def write_gguf(folder):
    small_gguf.write(folder / "m.gguf", llama(), tokenizer=tokenizer())


def read_gguf(folder):
    file = GGUFModel(folder / "m.gguf")
    weights.assemble(Llama, file.llama_config(), file.tensors(), torch.float32, folder)
    gguf_tokenizer.read(file)


def write_rows(folder):
    rows = [
        {"prompt": "What?", "completion": "That."},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def alter_rows(rng, folder):
    path = folder / "rows.jsonl"
    lines = path.read_bytes().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = altered_json(rng, lines[at])
    path.write_bytes(b"\n".join(lines))


def write_run(folder):
    info = registry.find("mdp")
    saved = run_folder.begin(info, config.Config(), toy=True)
    saved.write(folder)
    summary = {"module": "mdp", "toy": True, "metrics": {"a": 1.0}, "seconds": 1, "passed": None}
    checkpoint.write_json(folder / "summary.json", summary)


def read_run(folder):
    config.from_json(config.Config, run_folder.read(folder).config)
    run_folder.summary(folder)


def write_answers(folder):
    write_run(folder)
    rows = [{"prompt": f"question {i}", "before": "old", "after": "new"} for i in range(3)]
    checkpoint.write_json(folder / "answers.json", rows)


def write_tables(folder):
    write_run(folder)
    rows = [{"question": f"question {i}", "before": "old", "after": "new"} for i in range(3)]
    checkpoint.write_json(
        folder / "samples.json", [{"title": "others", "rows": [{"x": 1}]}, {"title": "a", "rows": rows}]
    )


def read_answers(folder):
    if run := answers.read("mdp", folder):
        answers.chosen([run, run], 5)


def write_checkpoint(folder):
    tree, tensors = checkpoint.flatten({"w": torch.ones(3), "n": {"a": (1, float("inf"))}})
    checkpoint.save(folder / "c", tensors, {"step": 3, "state": tree})


def write_metrics(folder):
    metrics = Metrics(folder / "metrics.csv")
    for step in range(5):
        metrics.log("train" if step < 3 else "second", step, {"loss": repr(1 / (step + 1))})
    metrics.flush()


def write_module(folder):
    there = registry.root() / "post_train/alignment/sft"
    for name in ("module.toml", "interview.toml"):
        (folder / "a" / "b" / "c").mkdir(parents=True, exist_ok=True)
        (folder / "a/b/c" / name).write_bytes((there / name).read_bytes())


def read_module(folder):
    content.read(registry._read(folder / "a/b/c/module.toml"))


def write_schedule(folder):
    (folder / "quiz.json").write_text(
        json.dumps(
            {
                "0123456789ab": {
                    "module": "sft", "level": 1,
                    "card": {"card_id": 1, "state": 1, "step": 0, "stability": 2.3, "difficulty": 2.1,
                             "due": "2026-01-01T00:00:00+00:00", "last_review": "2026-01-01T00:00:00+00:00"},
                    "history": [{"at": "2026-01-01T00:00:00+00:00", "share": 1.0}],
                }
            }
        )
    )  # fmt: skip


def write_world(folder):
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.ones(4), (4, 2))
    mdp.save(mdp.make(P, rng.normal(size=(4, 2)), gamma=0.9), folder / "world.npz")


def write_log(folder):
    n = 40
    rng = np.random.default_rng(0)
    np.savez(
        folder / "log.npz", observations=rng.normal(size=(n, 4)).astype(np.float32), actions=rng.integers(0, 2, n),
        rewards=np.ones(n, np.float32), terminations=np.arange(n) % 10 == 9, truncations=np.zeros(n, bool),
        next_observations=rng.normal(size=(n, 4)).astype(np.float32),
    )  # fmt: skip


def write_pictures(folder):
    for i, suffix in enumerate(("png", "jpg", "webp")):
        colors = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(colors).save(folder / f"{i}.{suffix}")


def write_images(folder):
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", x=x, labels=np.arange(5) % 3)


def denoiser(**shape):
    return registry.part("diffusion", "unet").UNet(**shape)


def write_denoiser(folder):
    shape = {"channels": 1, "classes": 2, "width": 8, "heads": 1}
    model = trained.Trained(denoiser(**shape), Process(), (1, 8, 8), ("a", "b"))
    trained.save(folder / "model", "unet", shape, model)


def write_dit(folder):
    model, convert, vae = (registry.part("dit", name) for name in ("model", "convert", "vae"))
    convert.save(model.DiT(model.DiTConfig(8, 4, 2, 8, 1, 2, 3)), folder)
    vae.save(vae.VAE(1, 8), folder)


def load_dit(folder):
    return registry.part("dit", "convert").load(folder), registry.part("dit", "vae").load(folder)


def write_shard(folder):
    parts, tensors = [], {}
    for i, (name, p) in enumerate(GPT(SHARDED).named_parameters()):
        parts.append(sharded.Part(name, sharded.WEIGHT, list(p.shape), 0, [(0, len(p))], 0, p.numel()))
        tensors[str(i)] = p.detach().clone()
    header = msgspec.json.encode(sharded.Header(1, parts)).decode()
    checkpoint.write_tensors(sharded.file_of(folder, 0), tensors, {"parts": header})


KINDS = {
    "llama config.json": (write_llama, "config.json", load.llama),
    "llama generation_config.json": (write_llama, "generation_config.json", load.llama),
    "llama safetensors": (write_llama, "model.safetensors", load.llama),
    "gpt config.json": (write_gpt, "config.json", load.gpt),
    "tokenizer.json": (write_llama, "tokenizer.json", load.tokenizer),
    "tokenizer_config.json": (write_llama, "tokenizer_config.json", load.tokenizer),
    "adapter_config.json": (write_adapter, "adapter_config.json", lambda f: adapters.load_adapter(llama(), f)),
    "adapter safetensors": (write_adapter, "adapter_model.safetensors", lambda f: adapters.load_adapter(llama(), f)),
    "gguf": (write_gguf, "m.gguf", read_gguf),
    "rows": (write_rows, alter_rows, lambda f: rows.read(f / "rows.jsonl")),
    "run config.json": (write_run, "config.json", read_run),
    "summary.json": (write_run, "summary.json", read_run),
    "answers.json": (write_answers, "answers.json", read_answers),
    "samples.json": (write_tables, "samples.json", read_answers),
    "meta.json": (write_checkpoint, "c/meta.json", lambda f: checkpoint.load(f / "c")),
    "checkpoint tensors": (write_checkpoint, "c/tensors.safetensors", lambda f: checkpoint.load(f / "c")),
    "metrics.csv": (write_metrics, "metrics.csv", lambda f: Metrics(f / "metrics.csv", resume=True).series()),
    "module.toml": (write_module, "a/b/c/module.toml", read_module),
    "interview.toml": (write_module, "a/b/c/interview.toml", read_module),
    "quiz schedule": (write_schedule, "quiz.json", lambda f: Schedule(f / "quiz.json")),
    "world": (write_world, "world.npz", lambda f: mdp.load(f / "world.npz")),
    "png": (write_pictures, "0.png", images.load),
    "jpg": (write_pictures, "1.jpg", images.load),
    "webp": (write_pictures, "2.webp", images.load),
    "images npz": (write_images, "images.npz", lambda f: images.load(f / "images.npz")),
    "denoiser config.json": (write_denoiser, "model/config.json", lambda f: trained.load(f / "model", denoiser)),
    "denoiser weights": (write_denoiser, "model/model.safetensors", lambda f: trained.load(f / "model", denoiser)),
    "dit config.json": (write_dit, "config.json", load_dit),
    "dit weights": (write_dit, "diffusion_pytorch_model.safetensors", load_dit),
    "vae.json": (write_dit, "vae.json", load_dit),
    "shard": (write_shard, "shard_00000.safetensors", lambda f: sharded.whole_model(f, SHARDED)),
    "log": (write_log, "log.npz", lambda f: logged_data.load(f / "log.npz")),
}


@contextlib.contextmanager
def bounds(seconds, room):
    """TimeoutError after `seconds`, MemoryError beyond `room` more bytes."""

    def late(*_):
        raise TimeoutError(f"not done after {seconds} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_malformed(kind, tmp_path):
    write, alter, read = KINDS[kind]
    write(tmp_path)
    read(tmp_path)  # as it was written, it is taken
    good, rng, refused = files(tmp_path), random.Random(kind), 0
    for case in range(CASES):
        if callable(alter):
            alter(rng, tmp_path)
        else:
            altered(rng, tmp_path / alter)
        line = ""
        try:
            with bounds(SECONDS, ROOM):
                read(tmp_path)
        except UserError as error:
            line = str(error)
        except Exception as error:
            raise AssertionError(f"{kind}, case {case}: {type(error).__name__}: {error}") from error
        assert "\n" not in line, f"case {case}: {line}"
        assert len(line) < 1000, f"case {case}: {line}"
        refused += line != ""
        for path, blob in good.items():
            path.write_bytes(blob)
    assert refused >= CASES // 5


def test_there_are_five_hundred():
    assert len(KINDS) * CASES >= 500
