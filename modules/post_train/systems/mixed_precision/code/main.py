"""Mixed precision: one small GPT trained in seven number formats, from the same weights on the same data.

    g = scale · dL/dθ in fp16     only if every element is finite: θ32 ← AdamW(θ32, g / scale), θ16 ← round(θ32)

Micikevicius et al. 2018 (arXiv:1710.03740): fp16 weights, activations and gradients, fp32 masters, a scaled loss.
"""

import copy
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune import memory, ops, optim
from finetune.errors import UserError
from finetune.lm.gpt import GPT, GPTConfig
from finetune.memory import meters
from finetune.memory import states as formulas
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import plots
from .formats import FORMATS, Format, StochasticAdamW, use_fp8
from .scaling import LossScaler
from .text import Text, load

Optimizer = optim.AdamW | StochasticAdamW
# Of the loss that fp32 removes, the share that a sound format may miss. Of eight seeds of the toy the worst missed 4 %
# (fp16 with scaling, which skips its first steps); fp16 without scaling misses more than all of it.
TOLERANCE = 0.1


@dataclass
class Config(config.Config):
    steps: int = 300
    checkpoint_every: int = 100
    data: Path | None = None  # a text file; none: the standard library's own reference (pydoc_data.topics)
    formats: str = ",".join(FORMATS)  # formats to train, separated by commas; the others are compared with fp32
    # --- model
    dim: int = bounded(128, at_least=1, at_most=1 << 20)  # width of the GPT
    layers: int = bounded(4, at_least=1, at_most=1 << 12)
    heads: int = bounded(4, at_least=1, at_most=1 << 16)
    length: int = bounded(128, at_least=1, at_most=1 << 24)  # characters of a row
    # --- training
    batch: int = bounded(8, at_least=1, at_most=1 << 24)  # rows of a step
    # tokens of the whole step, of which these rows are one rank's micro-batch: the loss is a sum divided by it, so that
    # the ranks' gradients add up. 3.2 million is GPT-3's batch (Brown et al. 2020, table 2.1); it makes gradients small
    tokens_per_step: int = bounded(3_200_000, at_least=1, at_most=10**12)
    lr: float = bounded(2e-3, at_least=0)  # peak learning rate
    # steps until the peak; from there a cosine falls to a tenth
    warmup: int = bounded(20, at_least=0, at_most=10**9)
    weight_decay: float = bounded(0.1, at_least=0)  # AdamW's, on matrices only
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    # --- loss scaling (fp16_scaled)
    policy: Literal["torch", "deepspeed"] = "torch"  # rule by which the scale changes
    # too large on purpose, so that the first steps show how it is found
    init_scale: float = bounded(2.0**30, above=0, at_most=2.0**126)
    # good steps until the scale doubles (torch's default: 2000)
    growth_interval: int = bounded(50, at_least=1, at_most=10**9)
    # deepspeed: overflows until the scale is halved
    hysteresis: int = bounded(2, at_least=1, at_most=10**9)
    # --- fp8
    # calls whose maximum decides the factor
    amax_history: int = bounded(16, at_least=1, at_most=1 << 16)
    # --- evaluation
    eval_batches: int = bounded(8, at_least=1, at_most=10**6)  # held-out batches to evaluate on

    @classmethod
    def toy(cls) -> "Config":
        return cls(
            steps=200, dim=64, layers=2, length=64, lr=3e-3, growth_interval=40, checkpoint_every=50,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.formats.split(","):
            if name not in FORMATS:
                raise UserError(f"--formats: '{name}' is not one of {', '.join(FORMATS)}")


def main(cfg: Config, run: Run) -> dict[str, Any]:
    text = load(cfg.data, cfg.length)
    names = cfg.formats.split(",")
    shape = GPTConfig(len(text.vocabulary), cfg.dim, cfg.layers, cfg.heads, cfg.length)
    wide = memory.Setup(batch=cfg.batch, seq=cfg.length)
    memory.check_memory(shape, wide, "--dim, --layers, --length or --batch")
    if not run.resume:
        needed = 3 * 16 * memory.parameters(memory.shape_of(shape)) * len(names)
        memory.check_disk(run.dir, needed, "the checkpoints of these formats")
    run.print(
        f"{len(text.train):,} characters to train on, {len(text.vocabulary)} different; formats: {', '.join(names)}"
    )
    losses: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name in names:
        model, optimizer, skipped = train(cfg, run, name, text)
        losses[name] = evaluate(cfg, model, text, FORMATS[name])
        run.print(f"{name}: held-out loss {losses[name]:.4f}")
        if name == "fp16_scaled":
            run.check("skipped_steps", skipped)
        if name == "fp32":
            check_lost_gradients(cfg, run, model, text)
        rows += memory_rows(cfg, name, model, optimizer, text) if cfg.steps else []
    before = evaluate(cfg, new_model(cfg, run, FORMATS["fp32"], text), text, FORMATS["fp32"])
    run.record_memory(rows)
    show(run, losses, before)
    check_sums(run)
    plots.losses(run, losses)
    plots.loss_scale(run, cfg.policy)
    return {}


# --- One format


def new_model(cfg: Config, run: Run, format: Format, text: Text) -> GPT:
    """The same weights for every format, rounded to it."""
    run.seed("model")
    model = GPT(GPTConfig(len(text.vocabulary), cfg.dim, cfg.layers, cfg.heads, cfg.length)).to(format.dtype)
    if format.fp8:
        use_fp8(model, cfg.amax_history)
    return model


def train(cfg: Config, run: Run, name: str, text: Text) -> tuple[GPT, Optimizer, int]:
    """Trains one format; the model, its optimizer and the number of skipped steps."""
    format = FORMATS[name]
    model = new_model(cfg, run, format, text)
    optimizer: Optimizer
    if format.stochastic:
        optimizer = StochasticAdamW(model.parameters(), cfg.weight_decay, cfg.seed)
    else:
        master: Any = "auto" if format.master else False
        optimizer = optim.AdamW(optim.decay_groups(model.parameters(), cfg.weight_decay), lr=cfg.lr, master=master)
    scaler = LossScaler(cfg.policy, cfg.init_scale if format.scaled else 1.0, cfg.growth_interval,
                        hysteresis=cfg.hysteresis)  # fmt: skip
    counts = {"skipped": 0}
    state = {"model": model, "optimizer": optimizer, "scaler": scaler, "counts": counts}
    for step in run.steps(cfg.steps, state, phase=name):
        inputs, targets = text.batch(text.train, cfg.batch, cfg.length, run.generator("batch", step))
        scale = float(scaler.scale)
        # forward and backward in the format, on the scaled loss
        with arithmetic(format):
            loss = loss_sum(model, inputs, targets)
            (loss * (scale / cfg.tokens_per_step)).backward()
        # check, clip and unscale. The gradients stay scaled in memory (1.0 rounds nothing), since the unscaled ones
        # would underflow in fp16 again; AdamW multiplies by 1 / scale in fp32
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found_inf, square = ops.unscale_check_finite_(grads, torch.tensor(1.0))
        overflow = bool(found_inf)
        # The sum over all ranks: together they have tokens_per_step tokens, and here all are alike.
        unscale = cfg.tokens_per_step / inputs.numel() / scale
        if not overflow:
            clip = min(1.0, cfg.clip / (math.sqrt(float(square)) * unscale + 1e-6))
            lr = optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
            with arithmetic(format):
                optimizer.step(lr=lr, grad_scale=unscale * clip)
        optimizer.zero_grad()
        run.log(step, loss=loss.item() / inputs.numel(), **({"scale": scale} if format.scaled else {}))
        counts["skipped"] += overflow
        if format.scaled:
            scaler.update(found_inf)
    return model, optimizer, counts["skipped"]


def arithmetic(format: Format) -> AbstractContextManager[None]:
    """The backend of the ops inside. There are no fp16 kernels for the CPU: norms, attention, loss and AdamW run their
    references, which compute in fp32 and round between the ops. The products of fp16 are torch's own."""
    return ops.use_backend("reference") if format.dtype == torch.float16 else ops.use_backend(None)


def loss_sum(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy (nats) summed over all positions, fp32."""
    hidden = model(inputs, hidden=True)  # (B, T, C)
    return ops.linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, targets.flatten(), reduction="sum")


@torch.no_grad()
def evaluate(cfg: Config, model: GPT, text: Text, format: Format) -> float:
    """Mean loss in nats on the same held-out rows for every format and seed."""
    total = 0.0
    with arithmetic(format):
        for i in range(cfg.eval_batches):
            inputs, targets = text.batch(text.held_out, cfg.batch, cfg.length, torch.Generator().manual_seed(i))
            total += loss_sum(model, inputs, targets).item() / inputs.numel()
    return total / cfg.eval_batches


# --- Why fp16 needs a scale, and bf16 a master copy


def check_lost_gradients(cfg: Config, run: Run, model: GPT, text: Text) -> None:
    """The share of the nonzero fp32 gradients that are 0 in fp16, without and with a scaled loss.

    The trained fp32 model's weights, one batch. `lost_weights`: gradients of the parameters; `lost_activations`:
    gradients of the blocks' outputs.
    """
    batch = text.batch(text.train, cfg.batch, cfg.length, torch.Generator().manual_seed(0))
    wide = all_gradients(cfg, model, batch, 1.0)
    half = copy.deepcopy(model).half()
    plain, scaled = (all_gradients(cfg, half, batch, scale) for scale in (1.0, 65536.0))
    for part, gradients in wide.items():
        lost, lost_scaled = (float((g[part][gradients != 0] == 0).double().mean()) for g in (plain, scaled))
        run.check(f"lost_{part}", lost, at_least=0.3)
        run.check(f"lost_{part}_scaled", lost_scaled, at_most=0.01)
    plots.exponents(run, wide)


def all_gradients(cfg: Config, model: GPT, batch: tuple[Tensor, Tensor], scale: float) -> dict[str, Tensor]:
    """Gradients of the parameters and of the blocks' outputs, of `scale` times the loss."""
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, of_inputs: Any, of_outputs: Any) -> None:
        kept.append(of_outputs[0].flatten())

    handles = [block.register_full_backward_hook(keep) for block in model.blocks]
    with ops.use_backend("reference"):
        (loss_sum(model, *batch) * (scale / cfg.tokens_per_step)).backward()
    for handle in handles:
        handle.remove()
    weights = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return {"weights": weights, "activations": torch.cat(kept)}


def check_sums(run: Run) -> None:
    """1 + 1000 · 1e-4 in bf16, whose last bit at 1 is 1/128: every addition is rounded away, unless the sum is kept in
    fp32 or rounded stochastically."""
    plain, master = (torch.tensor(1.0, dtype=torch.bfloat16) for _ in range(2))
    wide = torch.tensor(1.0)
    many = torch.ones(1000, dtype=torch.bfloat16)
    for step in range(1000):
        plain += 1e-4
        wide += 1e-4
        master = wide.bfloat16()
        many = ops.cast(many.float() + 1e-4, many.dtype, rounding="stochastic", seed=step)
    run.check("sum_bf16", float(plain), at_most=1.0)
    run.check("sum_master", float(master), at_least=1.095)
    run.check("sum_stochastic_error", abs(float(many.float().mean()) - 1.1), at_most=0.01)


# --- Results


def show(run: Run, losses: dict[str, float], before: float) -> None:
    """fp32 must learn, the sound formats must end within `TOLERANCE` of it, and fp16 without a scale further away."""
    reference = losses.get("fp32")
    bound = before if reference is None else reference + TOLERANCE * (before - reference)
    for name, loss in losses.items():
        if name == "fp32" or reference is None:
            run.result(f"loss_{name}", loss, baseline=before, target=before, higher=False)
        elif name in ("bf16", "fp16_scaled", "fp8", "bf16_stochastic"):
            run.result(f"loss_{name}", loss, baseline=before, target=bound, higher=False)
        elif name == "fp16":
            run.result("loss_fp16", loss, baseline=before)
            run.check("fp16_is_worse_by", loss - reference, at_least=0.1)
        else:
            run.check(f"loss_{name}", loss)
    if {"bf16", "bf16_no_master"} <= losses.keys():
        run.check("bf16_no_master_is_worse_by", losses["bf16_no_master"] - losses["bf16"])
    run.check("loss_before", before)


# --- Memory


def memory_plan(cfg: Config) -> tuple[GPTConfig, memory.Setup]:
    """The bf16 run with masters, for `python -m finetune memory mixed_precision`."""
    vocabulary = load(cfg.data, cfg.length).vocabulary
    shape = GPTConfig(len(vocabulary), cfg.dim, cfg.layers, cfg.heads, cfg.length)
    return shape, memory.Setup(batch=cfg.batch, seq=cfg.length, dtype="bf16")


def memory_rows(cfg: Config, name: str, model: GPT, optimizer: Optimizer, text: Text) -> list[dict[str, Any]]:
    """Weights, gradients and optimizer states (moments, master copy) of this format: by formula and as measured."""
    format = FORMATS[name]
    with arithmetic(format):
        loss_sum(model, *text.batch(text.train, 1, cfg.length, torch.Generator().manual_seed(0))).backward()
    shape = memory.shape_of(model.config)
    setup = memory.Setup(dtype=NAMES[format.dtype], master=format.master)
    if isinstance(optimizer, StochasticAdamW):
        states = meters.storage_bytes([*optimizer.exp_avg, *optimizer.exp_avg_sq])
    else:
        states = meters.optimizer_bytes(optimizer)
    rows = [
        ("weights", formulas.weights(shape, setup).bytes, meters.storage_bytes(model.parameters())),
        ("gradients", formulas.gradients(shape, setup).bytes, meters.gradient_bytes(model)),
        ("optimizer states", formulas.optimizer_states(shape, setup).bytes, states),
    ]
    if format.fp8:
        layers, kept = len(shape.linears) * shape.layers, 3 * 4 * cfg.amax_history
        rows.append(("maxima", layers * kept, meters.storage_bytes(model.buffers())))
    model.zero_grad(set_to_none=True)
    return [{"name": f"{name}: {part}", "predicted": a, "measured": b} for part, a, b in rows]


NAMES: dict[torch.dtype, Any] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
