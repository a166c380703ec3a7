"""What Flamingo adds to its frozen models, in the names of OpenFlamingo's checkpoints (`perceiver.*`,
`lang_encoder.gated_cross_attn_layers.N.*`), and the file that keeps it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm.io import weights
from finetune.runs import checkpoint, reading

from .model import Flamingo, FlamingoConfig

MLP = {"norm": "0", "up": "1", "down": "3"}  # places in their nn.Sequential
ATTENTION = {"q": "to_q", "kv": "to_kv", "o": "to_out"}
RESAMPLER = {"latents": "latents", "frames": "frame_embs", "places": "media_time_embs", "norm": "norm"}
LAYER = {"norm_features": "0.norm_media", "norm_latents": "0.norm_latents"}
GATED = {"norm": "attn.norm", "attn_gate": "attn_gate", "mlp_gate": "ff_gate"}
FILE = "flamingo.safetensors"


def theirs(name: str) -> str:
    """Our name → OpenFlamingo's. The added embeddings keep ours: there they are rows of the language model's table; and
    so do the mean and deviation of the features, which it does not have."""
    parts = name.split(".")
    if parts[0] == "resampler" and parts[1] == "layers":
        return ".".join(["perceiver", "layers", parts[2], *inner(parts[3:], LAYER, "0", "1")])
    if parts[0] == "resampler":
        return ".".join(["perceiver", RESAMPLER[parts[1]], *parts[2:]])
    if parts[0] == "gated":
        return ".".join(["lang_encoder.gated_cross_attn_layers", parts[1], *inner(parts[2:], GATED, "attn", "ff")])
    return name


def inner(parts: list[str], names: dict[str, str], attention: str, mlp: str) -> list[str]:
    """The rest of a name within a layer."""
    if parts[0] == "attn":
        return [attention, ATTENTION[parts[1]], *parts[2:]]
    if parts[0] == "mlp":
        return [mlp, MLP[parts[1]], *parts[2:]]
    return [names[parts[0]], *parts[1:]]


def reshaped(name: str, tensor: Tensor) -> Tensor:
    """Ours in the shape of theirs: places are (N, 1, C) there."""
    return tensor[:, None] if name == "resampler.places" else tensor


def state(model: Flamingo) -> dict[str, Tensor]:
    """What is trained, in their names."""
    return {theirs(name): reshaped(name, p.detach()) for name, p in kept(model).items()}


def kept(model: Flamingo) -> dict[str, Tensor]:
    """What is trained, and the statistics of the features; not the language model, should that be trained too."""
    frozen = ("encoder.", "language_model.")
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if not name.startswith(frozen)}


@torch.no_grad()
def put(model: Flamingo, found: dict[str, Tensor], where: str) -> None:
    """Copies tensors in their names into the model. UserError names what is missing, unknown or of another shape."""
    wanted = {theirs(name): (name, p) for name, p in kept(model).items()}
    if unknown := sorted(set(found) - set(wanted)):
        raise UserError(f"{where}: {unknown[0]} has no place in this Flamingo: is its config another?")
    for key, (name, parameter) in wanted.items():
        tensor = found.get(key)
        if tensor is None or tensor.shape != reshaped(name, parameter).shape:
            has = "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}"
            raise UserError(f"{where}: {key} {has}: it must be {tuple(reshaped(name, parameter).shape)}")
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {key} holds NaN or infinite numbers")
        parameter.copy_(tensor.view_as(parameter))


def save(model: Flamingo, folder: Path) -> None:
    """What is trained, and its shape; the two frozen models are not in it."""
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "flamingo.json", dataclasses.asdict(model.config))
    checkpoint.write_tensors(folder / FILE, {name: t.contiguous() for name, t in state(model).items()})


def load(model: Flamingo, folder: Path) -> None:
    """Fills a Flamingo of the same shape. UserError names the file that is missing or of another shape."""
    shape = reading.json_file(folder / "flamingo.json", FlamingoConfig)
    if shape != model.config:
        raise UserError(f"{folder / 'flamingo.json'} describes another shape than the model's: {shape}")
    put(model, dict(weights.read_file(folder / FILE)), str(folder / FILE))
