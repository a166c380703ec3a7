"""Shapes of well-known models as plain data: no weights and no torch, for the memory command and for tests.

Sources: the config.json published with each model. Keys are those of LlamaConfig or GPTConfig.
"""

from __future__ import annotations

from typing import Any

KEYS = ["vocab_size", "dim", "layers", "heads", "kv_heads", "hidden", "max_length", "rope_theta", "norm_eps", "tied"]

LLAMA: dict[str, dict[str, Any]] = {
    name: dict(zip(KEYS, row, strict=True))
    for name, row in {
        "llama-7b": (32000, 4096, 32, 32, 32, 11008, 2048, 1e4, 1e-6, False),
        "llama-13b": (32000, 5120, 40, 40, 40, 13824, 2048, 1e4, 1e-6, False),
        "llama-65b": (32000, 8192, 80, 64, 64, 22016, 2048, 1e4, 1e-5, False),
        "llama-2-7b": (32000, 4096, 32, 32, 32, 11008, 4096, 1e4, 1e-5, False),
        "llama-2-13b": (32000, 5120, 40, 40, 40, 13824, 4096, 1e4, 1e-5, False),
        "llama-2-70b": (32000, 8192, 80, 64, 8, 28672, 4096, 1e4, 1e-5, False),
        "llama-3-8b": (128256, 4096, 32, 32, 8, 14336, 8192, 5e5, 1e-5, False),
        "llama-3-70b": (128256, 8192, 80, 64, 8, 28672, 8192, 5e5, 1e-5, False),
        "tinyllama-1.1b": (32000, 2048, 22, 32, 4, 5632, 2048, 1e4, 1e-5, False),
        "smollm2-135m": (49152, 576, 30, 9, 3, 1536, 8192, 1e5, 1e-5, True),
        "smollm2-360m": (49152, 960, 32, 15, 5, 2560, 8192, 1e5, 1e-5, True),
        "smollm2-1.7b": (49152, 2048, 24, 32, 32, 8192, 8192, 1.3e5, 1e-5, True),
    }.items()
}

GPT: dict[str, dict[str, Any]] = {
    name: {"vocab_size": 50257, "dim": dim, "layers": layers, "heads": heads, "max_length": 1024}
    for name, (dim, layers, heads) in {
        "gpt2": (768, 12, 12),
        "gpt2-medium": (1024, 24, 16),
        "gpt2-large": (1280, 36, 20),
        "gpt2-xl": (1600, 48, 25),
    }.items()
}
