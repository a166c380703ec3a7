"""Scaling of the rotary embedding in GGUF, to and from `RopeScaling`.

Linear scaling and YaRN are metadata. The rule of Llama 3 is a tensor, rope_freqs.weight: what each frequency is divided
by. Its parameters are not in the file, so they are recovered from it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.lm.io.config import checked
from finetune.lm.io.gguf_file import GGUFFile
from finetune.lm.layers import RopeScaling
from finetune.runs import reading

FREQS = "rope_freqs.weight"
KEYS = ("type", "factor", "original_context_length", "attn_factor", "yarn_attn_factor", "yarn_ext_factor",
        "yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier")  # fmt: skip
UNUSED = {"yarn_ext_factor": (-1.0, 1.0), "yarn_log_multiplier": (0.0,)}  # values that change nothing


def decimal(value: float) -> float:
    """The shortest decimal that is this fp32 number: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def read(file: GGUFFile, architecture: str, theta: float, head_dim: int, length: int) -> RopeScaling:
    """The scaling of a file whose context length is `length`; UserError names what cannot be represented."""
    place = f"{architecture}.rope.scaling"
    given: dict[str, Any] = {key: file.get(f"{place}.{key}") for key in KEYS}
    given["factor"] = given["factor"] or file.get(f"{architecture}.rope.scale_linear") or 0.0
    for key, value in given.items():
        if key != "type" and value is not None and (not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise UserError(f"{file.path}: {place}.{key} is {value!r}, not a finite number")
    kind, factor = given["type"] or "linear", decimal(given["factor"]) or 1.0  # llama.cpp: linear by default
    if FREQS in file.tensor_infos:
        if kind not in ("none", "linear") or factor != 1.0:
            raise UserError(f"{file.path}: {place}.type {kind!r} together with the tensor {FREQS} is not supported")
        return llama3(file, theta, head_dim)
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{file.path}: {place}.type {kind!r} is not supported (only none, linear, yarn)")
    for key, values in UNUSED.items():
        if kind == "yarn" and given[key] not in (None, *values):
            raise UserError(f"{file.path}: {place}.{key} = {given[key]} is not supported")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeScaling()
    if kind == "linear":
        return checked(RopeScaling, file.path, kind="linear", factor=factor)
    # llama.cpp multiplies YaRN's own 0.1 ln(factor) + 1 by attn_factor; converters write the product, yarn_attn_factor.
    attention = given["yarn_attn_factor"] or 0.0
    if given["attn_factor"] not in (None, 1.0):
        attention = given["attn_factor"] * own_attention(factor)
    return checked(
        RopeScaling,
        file.path,
        kind="yarn",
        factor=factor,
        original_length=reading.convert(
            given["original_context_length"] or length, int, f"{file.path}: {place}.original_context_length"
        ),
        beta_fast=decimal(given["yarn_beta_fast"] or 32.0),
        beta_slow=decimal(given["yarn_beta_slow"] or 1.0),
        attention_factor=decimal(attention),
    )


def own_attention(factor: float) -> float:
    """What YaRN multiplies the scores' root by, if nothing else is given (Peng et al. 2023, arXiv:2309.00071, §3.4)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def wavelengths(theta: float, head_dim: int) -> np.ndarray:
    """Positions in a whole turn of each rotary pair; (D/2,)."""
    return 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)


def llama3_factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """What Llama 3.1 divides each frequency by, (D/2,) fp64: 1 for waves shorter than original_length /
    high_freq_factor, `factor` for those longer than original_length / low_freq_factor, between them interpolated."""
    turns = scaling.original_length / wavelengths(theta, head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def llama3(file: GGUFFile, theta: float, head_dim: int) -> RopeScaling:
    """Parameters of Llama 3's rule that reproduce the file's tensor; UserError if there are none.

    Only ratios count: low_freq_factor is taken as 1. In between the two ends 1/factors is linear in the number of turns
    within original_length, so that two such factors determine the rest, and one does if high_freq_factor is 4, as in
    every published model.
    """
    factors = file.tensor(FREQS).astype(np.float64)
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or factors.min() <= 0:
        raise UserError(f"{file.path}: tensor {FREQS} is not {head_dim // 2} positive numbers")
    factor = decimal(factors.max())
    if factor == 1.0 and factors.min() == 1.0:
        return RopeScaling()
    waves = wavelengths(theta, head_dim)
    between = (factors > 1 + 1e-6) & (factors < factor * (1 - 1e-6))
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    tried = [(8192, 4.0)]  # original_length, high_freq_factor
    tried += [(round(length), 4.0) for length in waves[between] * (3 * smooth + 1)]
    tried += [(1 << power, 4.0) for power in range(4, 21)]
    if between.sum() >= 2:
        slope, start = np.polyfit(1 / waves[between], smooth, 1)  # smooth = (original / wave − 1) / (high − 1)
        if start < 0:
            high = 1 - 1 / start
            tried.append((round(slope * (high - 1)), round(high, 3)))
    for length, high in tried:
        if length < 1 or high <= 1 or factor < 1:
            continue
        one = RopeScaling("llama3", factor, length, 1.0, high)
        if np.abs(llama3_factors(one, theta, head_dim) / factors - 1).max() < 1e-4:
            return one
    raise UserError(f"{file.path}: tensor {FREQS} does not follow the rule of Llama 3, so it cannot be represented")


def metadata(
    scaling: RopeScaling, architecture: str, theta: float, head_dim: int
) -> tuple[dict[str, Any], np.ndarray | None]:
    """The metadata of a scaling, and for Llama 3's rule the tensor; UserError for what llama.cpp does not have."""
    place, factor = f"{architecture}.rope.scaling", float(scaling.factor)
    if scaling.kind == "none" or (scaling.kind == "linear" and factor == 1.0):
        return {}, None
    if scaling.kind == "linear":
        return {f"{place}.type": "linear", f"{place}.factor": factor}, None
    if scaling.kind == "llama3":
        if architecture != "llama":
            raise UserError(f"rope scaling llama3 cannot be written for the architecture {architecture} of GGUF")
        return {}, llama3_factors(scaling, theta, head_dim).astype(np.float32)
    if scaling.kind != "yarn":
        raise UserError(f"rope scaling {scaling.kind} cannot be written as GGUF (only linear, llama3, yarn)")
    if (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32.0, 1.0, True):
        raise UserError(
            "llama.cpp computes yarn with beta_fast 32, beta_slow 1 and whole dimensions; the model has "
            f"{scaling.beta_fast}, {scaling.beta_slow}, truncate = {str(scaling.truncate).lower()}"
        )
    found = {f"{place}.type": "yarn", f"{place}.factor": factor}
    if scaling.original_length:
        found[f"{place}.original_context_length"] = scaling.original_length
    relative = scaling.magnitude / own_attention(factor)
    if not math.isclose(relative, 1.0, rel_tol=1e-6):
        found[f"{place}.attn_factor"] = relative
    return found, None
