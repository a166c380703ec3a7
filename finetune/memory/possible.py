"""Refusal of setups that cannot exist: settings that exclude each other, and those that a model's shape excludes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.memory.setup import Setup, Shape


def check_settings(setup: Setup) -> None:
    """UserError for the first pair of settings that exclude each other whatever the model."""
    s, virtual = setup, setup.prompt or setup.prefix
    adapters = "the formulas know it for full fine-tuning only"
    more = "--whole" if s.whole else "--lora-targets head" if s.adapts_head else ""
    many = [f"--{name}" for name in ("zero", "tp", "pp", "offload") if getattr(s, name) != getattr(type(s), name)]
    rules = (
        (s.zero and s.ranks == 1, f"--zero {s.zero}: one rank has nothing to divide; give the number of --ranks"),
        (
            s.zero and s.optimizer == "adafactor",
            f"--zero {s.zero}: Adafactor needs whole rows and columns, which ZeRO cuts; take another --optimizer",
        ),
        (
            s.zero > 1 and s.pp > 1,
            f"--zero {s.zero} with --pp {s.pp}: gradients would be reduced once a micro-batch; take --zero 1",
        ),
        (
            s.sequence_parallel and s.tp == 1,
            "--sequence-parallel divides a row among tensor-parallel ranks: give their number with --tp",
        ),
        (
            s.sequence_parallel and s.seq % s.tp,
            f"--sequence-parallel: {s.seq} tokens a row cannot be divided by --tp {s.tp}",
        ),
        (s.sequence_parallel and s.frozen, f"--sequence-parallel: {adapters}"),
        (
            s.checkpointing == "selective" and s.attention == "flash",
            "--checkpointing selective computes T×T attention again, which flash attention does not keep: "
            "take --checkpointing block, or --attention naive",
        ),
        (
            s.grad_dtype != "same" and s.frozen,
            f"--grad-dtype {s.grad_dtype}: gradients of adapters and virtual tokens are fp32",
        ),
        (
            s.offload == "parameters" and s.zero < 3 and s.ranks > 1,
            "--offload parameters: several ranks divide them first; give --zero 3",
        ),
        (s.offload == "parameters" and s.frozen, f"--offload parameters: {adapters}"),
        (s.whole and not s.lora_rank, "--whole: modules are trained whole next to LoRA; give a --lora-rank"),
        (s.untied and not s.whole, "--untied is for --whole: give it a module"),
        (more and many, f"{more}: the formulas know it on one device that holds everything; omit {', '.join(many)}"),
        (
            s.whole and s.dtype != "fp32" and not s.master and s.optimizer in ("sgd_momentum", "muon"),
            f"--whole with --no-master: momenta of {s.optimizer} would have two dtypes; take --optimizer adamw",
        ),
        (s.offload == "parameters" and s.pp > 1, "--offload parameters and --pp exclude each other: omit one"),
        (s.offload != "none" and s.algorithm == "ppo", "--offload: the formulas do not know it for ppo's four models"),
        (
            s.algorithm in ("ppo", "rlhf") and s.optimizer in ("adafactor", "muon", "adamw8bit"),
            f"--algorithm {s.algorithm}: the formula of its value model does not know {s.optimizer}; take --optimizer "
            "adamw",
        ),
        (
            s.algorithm == "rlhf" and not s.lora_rank,
            "--algorithm rlhf: its models are adapters on the same weights: give a --lora-rank, or --algorithm ppo",
        ),
        (
            s.algorithm == "rlhf" and (many or s.ranks > 1),
            "--algorithm rlhf: the formulas know it on one device; omit --ranks, --zero, --tp, --pp and --offload",
        ),
        (
            s.optimizer in ("adafactor", "muon") and virtual,
            f"--optimizer {s.optimizer} is for matrices, not for virtual tokens; take --optimizer adamw",
        ),
        (
            s.pp > 1 and (s.algorithm == "ppo" or s.prompt),
            "--pp: the formulas know pipelines of one language model; omit --algorithm ppo and --prompt",
        ),
        (
            not s.training and (s.lora_rank or virtual),
            "--optimizer none is inference, where adapters are merged: omit --lora-rank, --prompt and --prefix",
        ),
        (
            not s.training and (s.offload == "optimizer" or s.checkpointing != "none"),
            "--optimizer none is inference: --checkpointing and --offload optimizer are for training",
        ),
    )
    for broken, text in rules:
        if broken:
            raise UserError(text)


def check_shape(name: str, shape: Shape, setup: Setup) -> None:
    """UserError for the first setting that a model of this shape cannot have."""
    longest = f"{name} has {shape.max_length:,} positions"
    if setup.document > shape.max_length:
        more = "; --batch adds rows, --packing documents in a row" if setup.training else ""
        raise UserError(f"--seq {setup.seq}: {longest}, a text cannot be longer{more}")
    if shape.capped_logits and setup.loss == "full":
        raise UserError(f"--loss full: the logits of {name} have a soft cap, which only the chunked loss has")
    if setup.prompt >= setup.seq:
        raise UserError(f"--prompt {setup.prompt}: a row of --seq {setup.seq} includes it, no token would be left")
    if setup.prefix + setup.seq > shape.max_length:
        raise UserError(f"--prefix {setup.prefix} --seq {setup.seq}: {longest} for both")
    if setup.pp > shape.layers:
        raise UserError(f"--pp {setup.pp}: {name} has {shape.layers} layers, and a stage needs at least one")
    for what, count in (("heads", shape.heads), ("KV heads", shape.kv_heads), ("MLP columns", shape.hidden)):
        if count % setup.tp:
            raise UserError(f"--tp {setup.tp}: {name} has {count:,} {what}, which is no multiple of {setup.tp}")
    adapted = {target: shape.linears[target] for target in setup.targets(shape)}
    if setup.adapts_head:
        adapted["head"] = shape.dim, shape.vocab
    for target, (inputs, outputs) in adapted.items():
        if setup.lora_rank > (least := min(inputs, outputs)):
            raise UserError(
                f"--lora-rank {setup.lora_rank}: layer {target} of {name} has {inputs:,} inputs and {outputs:,} "
                f"outputs, so a rank above {least:,} adds nothing"
            )
    if setup.untied and not shape.tied:
        raise UserError(f"--untied: embedding and head of {name} are two tables already; omit it")
