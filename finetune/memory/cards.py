"""Memory of common cards, and which of them a setup fits on."""

from __future__ import annotations

import re
from typing import Any

from finetune.errors import UserError, nearest

# MiB as nvidia-smi reports them: less than the GB of the name where the card keeps its error correction in them.
CARDS = {
    "RTX 3060": 12_288,
    "T4": 15_360,
    "V100 16 GB": 16_384,
    "A10": 23_028,
    "L4": 23_034,
    "RTX 3090": 24_576,
    "RTX 4090": 24_564,
    "V100 32 GB": 32_768,
    "RTX 5090": 32_607,
    "A100 40 GB": 40_960,
    "L40S": 46_068,
    "A100 80 GB": 81_920,
    "H100 80 GB": 81_559,
    "H200": 143_771,
    "B200": 183_359,
}

# What CUDA's context and the libraries' kernels take before the first tensor: Hugging Face's transformers, "Model
# training anatomy", measured 1,343 MiB of a tiny tensor's process. It differs with card, driver and libraries.
CONTEXT = 1_343 << 20

UNITS = {"gib": 1 << 30, "gb": 10**9, "mib": 1 << 20, "mb": 10**6, "tib": 1 << 40, "tb": 10**12, "": 1 << 30}


def usable(card: str) -> int:
    """Bytes of a card for tensors."""
    return (CARDS[card] << 20) - CONTEXT


def here() -> dict[str, int]:
    """The bytes of this machine's CUDA devices by their names."""
    import torch

    devices = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
    return {f"{device.name} (here)": device.total_memory for device in devices}


def verdicts(needed: int) -> list[dict[str, Any]]:
    """card, its bytes, those for tensors, and what is left of them: negative where the card is too small. The cards of
    this machine come last."""
    known = {card: size << 20 for card, size in CARDS.items()} | here()
    return [
        {"card": card, "bytes": size, "usable": size - CONTEXT, "left": size - CONTEXT - needed}
        for card, size in known.items()
    ]


def budget(text: str) -> int:
    """Bytes for tensors of `24 GiB`, `24` (GiB), `80GB` or the name of a card, less the context. UserError for another
    text and for what the context fills."""
    for card in CARDS:
        if card.lower().replace(" ", "") == text.lower().replace(" ", ""):
            return usable(card)
    found = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    try:
        size = int(float(found[1]) * UNITS[found[2].lower()]) if found else 0
    except (ValueError, KeyError):
        size = 0
    if not found or not size:
        raise UserError(f"--for {text!r} is neither a size such as '24 GiB' nor one of {', '.join(CARDS)}"
                        f"{nearest(text, CARDS)}")  # fmt: skip
    if size <= CONTEXT:
        raise UserError(f"--for {text!r}: CUDA's context alone takes {CONTEXT >> 20:,} MiB")
    return size - CONTEXT
