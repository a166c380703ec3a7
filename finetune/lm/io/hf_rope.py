"""Rotary embedding in a Hugging Face config.json: rope_theta and rope_scaling (transformers 4), rope_parameters (5)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

import msgspec

from finetune.errors import UserError
from finetune.lm.io.config import Size, checked
from finetune.lm.layers import RopeScaling
from finetune.runs import reading

LayerType = Literal["full_attention", "sliding_attention"]


class Thetas(Protocol):
    """What is read at the top of config.json."""

    max_position_embeddings: int
    rope_theta: float
    rope_local_base_freq: float


class RopeKeys(msgspec.Struct, forbid_unknown_fields=True):
    """The keys of rope_scaling (transformers 4) and rope_parameters (5)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: reading.Positive | None = None
    factor: Annotated[float, msgspec.Meta(ge=1, le=1 << 16)] | None = None
    original_max_position_embeddings: Size | None = None
    low_freq_factor: reading.Positive | None = None
    high_freq_factor: reading.Positive | None = None
    beta_fast: reading.Positive | None = None
    beta_slow: reading.Positive | None = None
    attention_factor: reading.Positive | None = None
    mscale: reading.NonNegative | None = None
    mscale_all_dim: reading.NonNegative | None = None
    truncate: bool | None = None
    partial_rotary_factor: float | None = None
    finetuned: bool | None = None  # of early YaRN models, without effect


# The kinds of scaling, and the fields of RopeScaling that each has from keys of the same names.
KINDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read(raw: dict[str, Any], top: Thetas, source: object, nested: bool) -> tuple[float, RopeScaling, float]:
    """theta, scaling, and the theta of the window layers, which a family may have apart (`nested`), from the keys of
    config.json: `raw` are all, `top` those that are not in rope_scaling or rope_parameters."""
    both = {key: raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)}
    if len(both) == 2 and both["rope_scaling"] != both["rope_parameters"]:
        raise UserError(f"{source}: rope_scaling and rope_parameters contradict each other: remove one")
    key, found = next(iter(both.items()), ("rope_scaling", {}))
    where, local_theta = f"{source}: {key}", top.rope_local_base_freq
    if nested and key == "rope_parameters":
        kinds = reading.convert(found, dict[LayerType, dict[str, Any] | None], where)
        local = reading.convert(kinds.get("sliding_attention") or {}, RopeKeys, f"{where}.sliding_attention")
        if (local.rope_type or local.type or "default") != "default":
            raise UserError(f"{where}.sliding_attention: scaling of the window layers is not supported")
        local_theta = local.rope_theta or local_theta
        found, where = kinds.get("full_attention") or {}, f"{where}.full_attention"
    kind = found.get("rope_type", found.get("type")) if isinstance(found, dict) else None
    if isinstance(kind, str) and kind not in ("default", *KINDS):
        raise UserError(f"{where} of type {kind!r} is not supported (only default, {', '.join(KINDS)})")
    keys = reading.convert(found, RopeKeys, where)
    kind = keys.rope_type or keys.type or "default"
    if keys.partial_rotary_factor not in (None, 1.0):
        raise UserError(f"{where}: partial_rotary_factor = {keys.partial_rotary_factor} is not supported (only 1.0)")
    theta = keys.rope_theta or top.rope_theta
    if kind == "default":
        return theta, RopeScaling(), local_theta
    length = top.max_position_embeddings
    original = length if kind == "dynamic" else keys.original_max_position_embeddings or length
    if kind == "yarn" and keys.factor is None:
        keys.factor = length / original
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    for name in needed:
        if getattr(keys, name) is None:
            raise UserError(f"{where} of type {kind!r} needs {name}")
    given = {name: getattr(keys, name) for name in KINDS[kind]}
    given = {name: value for name, value in given.items() if value is not None}
    scaling = checked(RopeScaling, where, kind=kind, original_length=0 if kind == "linear" else original, **given)
    return theta, scaling, local_theta


def written(scaling: RopeScaling) -> dict[str, Any] | None:
    """The value of rope_scaling, which transformers 5 reads too."""
    if scaling.kind == "none":
        return None
    given = {name: getattr(scaling, name) for name in KINDS[scaling.kind]}
    if scaling.kind in ("yarn", "llama3"):
        given["original_max_position_embeddings"] = scaling.original_length
    truncate = {"truncate": scaling.truncate} if scaling.kind == "yarn" else {}
    return {"rope_type": scaling.kind} | {key: value for key, value in given.items() if value} | truncate
