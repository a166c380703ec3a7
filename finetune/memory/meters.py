"""Measured memory of a model: tensors that are alive, tensors saved for a backward pass, allocations,
and the resident set of the process.

Tensors are counted by their storages, each once, whole: views, tied weights and shared inputs cost nothing extra.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from finetune.memory.formulas import predict
from finetune.memory.setup import Setup, Shape, shape_of
from finetune.runs import machine

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- tensors ---------------------------------------------------------------------------------------------------------


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def weight_bytes(model: nn.Module) -> int:
    """Parameters, and buffers: frozen weights in few bits are such; the base's modules of which copies are trained."""
    from finetune.peft.whole import kept

    modules = (model, *kept(model).base.values())
    return storage_bytes(chain.from_iterable((*m.parameters(), *m.buffers()) for m in modules))


def gradient_bytes(model: nn.Module) -> int:
    return storage_bytes(p.grad for p in model.parameters() if p.grad is not None)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Moments and master copies. A scalar (the count of steps) is not one of them."""
    return storage_bytes(t for t in tensors_in(list(optimizer.state.values())) if t.dim())


def constants(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that stay with the model whatever it computes: parameters, buffers and tables (such as the rotary angles)
    that its modules or plain objects in them hold."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for value in vars(module).values():
            yield from tensors_in(value)
            if type(value).__module__.startswith("finetune."):
                yield from tensors_in(vars(value))


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps between `forward()` and its backward pass, without the model's own tensors; from hooks
    on every tensor that is saved. Tensors that checkpointed blocks compute again are not kept and not counted."""
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        # Not the tensor: an operation's own output in its saved tensors is a cycle, which nothing would ever free.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        result = forward()
    own = {t.untyped_storage().data_ptr() for t in constants(model)}
    total = sum(s.nbytes() for pointer, s in saved.items() if pointer not in own)
    del result
    return total


def peak_allocated(call: Callable[[], Any]) -> int:
    """Most bytes that torch's allocator gave out at once during `call()`, above those before: exact, whatever the
    process's heap does with them."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler announces itself on stderr otherwise
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    now = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    del result
    return peak


# ---- the process -----------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Resident set of this process now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # macOS
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) * 1024


def trim_heap() -> bool:
    """Gives freed memory back to the system. glibc keeps freed blocks of up to 32 MiB in its heap, where they count as
    resident; without this a second step would seem to need nothing. False where the C library cannot."""
    gc.collect()
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0)) or True
    except (OSError, AttributeError):
        return False


def mmap_threshold(size: int) -> bool:
    """Blocks of at least `size` bytes come from the system and go back at once, instead of leaving holes in the heap:
    with glibc's own moving threshold (up to 32 MiB) the holes of a training step came to 15 % of it, with checkpointing
    to 75 %. The price is that the system clears each block again. False where the C library cannot."""
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(-3, size)) and bool(libc.mallopt(-1, 2 * size))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return False


def plug_holes(least: int = 4096) -> list[int]:
    """Takes the heap's free blocks of at least `least` bytes, without touching them; the pointers, for `unplug_holes`.

    glibc serves large requests, too, from the holes that earlier work left in the heap, and memory taken and returned
    there stays resident: a step of 149 MB then seemed to need 199. [] where the C library is another.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return []
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    mmap_threshold(least)  # what the heap has no hole for comes from the system
    plugs, size = [], 1 << 30
    while size >= least:
        if not (pointer := libc.malloc(size)):
            size //= 2
        elif ctypes.c_size_t.from_address(pointer - ctypes.sizeof(ctypes.c_size_t)).value & 2:  # IS_MMAPPED: no hole
            unplug_holes([pointer])
            size //= 2
        else:
            plugs.append(pointer)
    return plugs


def unplug_holes(plugs: list[int]) -> None:
    for pointer in plugs:
        ctypes.CDLL(None).free(ctypes.c_void_p(pointer))


class Peak:
    """`with Peak() as peak: …` then `peak.growth`: highest resident set inside, above that at entry, in bytes.

    Counted is what the work inside holds at once, as pages of this process: its tensors, the kernels' and libraries'
    scratch, and what code and threads touch for the first time (warm up before, if that is not meant). Holes in the
    heap are not: those of before are plugged, and inside, blocks of 1 MiB and more go back to the system when they are
    freed (`mmap_threshold`).

    Linux keeps the peak itself (VmHWM), and /proc/self/clear_refs sets it back; elsewhere, and where that is forbidden,
    a thread samples the resident set (`exact` is False) and can miss what lives for less than `interval` seconds.
    """

    def __init__(self, interval: float = 0.005, exact: bool = True) -> None:
        self.interval, self.exact = interval, exact
        self.start = self.highest = 0
        self.stop = threading.Event()

    def __enter__(self) -> Peak:
        trim_heap()
        self.plugs = plug_holes()
        mmap_threshold(1 << 20)
        self.exact = self.exact and machine.reset_peak_rss()
        self.start = self.highest = resident_bytes()
        if not self.exact:
            self.thread = threading.Thread(target=self.sample, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.exact:
            self.highest = max(self.highest, machine.peak_rss_bytes(since_reset=True))
        else:
            self.stop.set()
            self.thread.join()
            self.highest = max(self.highest, resident_bytes())
        unplug_holes(self.plugs)
        mmap_threshold(32 << 20)  # where glibc's own threshold ends up in a process that frees large tensors

    def sample(self) -> None:
        while not self.stop.is_set():
            self.highest = max(self.highest, resident_bytes())
            time.sleep(self.interval)

    @property
    def growth(self) -> int:
        return self.highest - self.start


# ---- a model of a setup ----------------------------------------------------------------------------------------------


def build(config: Any, setup: Setup) -> Any:
    """The model of a config (as `shape_of` takes it) with random weights, as `setup` wants it, a prompt or prefix in
    its attribute `virtual`."""
    from finetune.lm.gpt import GPT, GPTConfig
    from finetune.lm.llama import Llama, LlamaConfig
    from finetune.peft import lora, quantize, virtual_tokens, whole

    settings = config if isinstance(config, dict) else asdict(config)
    kinds: tuple[Any, Any] = (Llama, LlamaConfig) if "rope_theta" in settings else (GPT, GPTConfig)
    default = torch.get_default_dtype()
    torch.set_default_dtype(TORCH_DTYPES[setup.dtype])
    try:
        model = kinds[0](kinds[1](**settings))
    finally:
        torch.set_default_dtype(default)
    if setup.quantized != "none":
        quantize.quantize_linears(model, setup.quantized)
    if setup.lora_rank:
        targets, kind = (*setup.targets(shape_of(config)), *(("head",) if setup.adapts_head else ())), setup.adapter
        lora.apply_lora(model, setup.lora_rank, targets=targets, dora=kind == "dora", pissa=kind == "pissa")
    if setup.untied:
        whole.untie(model)
    if setup.whole:
        lora.train_modules(model, setup.whole.split(","))
    if count := setup.prompt or setup.prefix:
        part = virtual_tokens.Prompt if setup.prompt else virtual_tokens.Prefix
        model.virtual = part.from_tokens(model.requires_grad_(False), torch.arange(count))
    model.gradient_checkpointing = setup.checkpointing == "block"
    return model


def of_depth(config: Any, layers: int) -> dict[str, Any]:
    """The config with as many layers; its lists of layers are cut."""
    settings = config if isinstance(config, dict) else asdict(config)
    lists = {key: settings[key] for key in ("window_layers", "nope_layers") if key in settings}
    return {**settings, "layers": layers, **{key: [at for at in each if at < layers] for key, each in lists.items()}}


# ---- predicted and measured ---------------------------------------------------------------------------------------


def measure(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, loss: Callable[[], Tensor] | None = None
) -> dict[str, int]:
    """Bytes by the names of `predict`. `loss()` runs one forward and returns the scalar to differentiate: it is called
    twice, gradients are dropped before and after, parameters and optimizer states stay as they are."""
    measured = {"weights": weight_bytes(model)}
    if optimizer is not None:
        measured["optimizer states"] = optimizer_bytes(optimizer)
    if loss is None:
        return measured
    model.zero_grad(set_to_none=True)
    measured["activations"] = saved_bytes(model, loss)
    with Peak() as peak:
        loss().backward()
    measured["gradients"] = gradient_bytes(model)
    measured["step growth"] = peak.growth
    model.zero_grad(set_to_none=True)
    return measured


def loss_bytes(model: Any, shape: Shape, setup: Setup) -> int:
    """Most bytes that the loss has allocated at once, on as many tokens as `setup` says, all of them counted; a head
    with an adapter is there before."""
    from finetune import ops
    from finetune.alignment import logprobs
    from finetune.lm import head

    weight = model.head_weight
    x = torch.zeros(setup.tokens, shape.dim, dtype=weight.dtype, device=weight.device, requires_grad=True)
    targets = torch.zeros(setup.tokens, dtype=torch.int64, device=weight.device)
    if setup.loss == "logprobs" or shape.capped_logits:  # whose chunks are computed again in the backward pass
        before = [(p, p.grad) for p in model.parameters()]
        if setup.loss == "logprobs":
            found = peak_allocated(lambda: logprobs.of_states(model, x, targets)[0].mean().backward())
        else:
            found = peak_allocated(lambda: head.cross_entropy(model, x, targets).backward())
        for p, grad in before:
            p.grad = grad
        return found
    return peak_allocated(lambda: ops.linear_cross_entropy(x, weight, targets))


def table(predicted: dict[str, int], measured: dict[str, int]) -> list[dict[str, Any]]:
    """Rows for `run.memory`: name, predicted and measured bytes, for every name that was measured."""
    return [
        {"name": name, "predicted": value, "measured": measured[name]}
        for name, value in predicted.items()
        if name in measured
    ]


def record_step(
    run: Any,
    config: Any,
    setup: Setup,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
) -> None:
    """Measures a training step and records it in the run next to its prediction (see `for_training`)."""
    run.print("measuring the memory of a step …")
    run.record_memory(for_training(config, setup, model=model, optimizer=optimizer, loss=loss))


def for_training(
    config: Any, setup: Setup, *, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]
) -> list[dict[str, Any]]:
    """See the text of `finetune.memory`: a row each for weights, gradients, optimizer states, activations, logits and
    the growth of the resident set in a step (what a step adds to weights and optimizer states at its peak)."""
    shape = shape_of(config)
    measured = measure(model, optimizer, loss)
    if setup.loss != "full":
        measured["logits"] = loss_bytes(model, shape, setup)
    return table({term.name: term.bytes for term in predict(shape, setup)}, measured)
