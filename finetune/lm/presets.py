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
        "llama-3.1-8b": (128256, 4096, 32, 32, 8, 14336, 131072, 5e5, 1e-5, False),
        "llama-3.2-1b": (128256, 2048, 16, 32, 8, 8192, 131072, 5e5, 1e-5, True),
        "llama-3.2-3b": (128256, 3072, 28, 24, 8, 8192, 131072, 5e5, 1e-5, True),
        "mistral-7b": (32000, 4096, 32, 32, 8, 14336, 32768, 1e4, 1e-5, False),
        "qwen2.5-0.5b": (151936, 896, 24, 14, 2, 4864, 32768, 1e6, 1e-6, True),
        "qwen2.5-7b": (152064, 3584, 28, 28, 4, 18944, 131072, 1e6, 1e-6, False),
        "qwen3-0.6b": (151936, 1024, 28, 16, 8, 3072, 40960, 1e6, 1e-6, True),
        "qwen3-8b": (151936, 4096, 36, 32, 8, 12288, 40960, 1e6, 1e-6, False),
        "smollm3-3b": (128256, 2048, 36, 16, 4, 11008, 65536, 5e6, 1e-6, True),
        "gemma-2-2b": (256000, 2304, 26, 8, 4, 9216, 8192, 1e4, 1e-6, True),
        "gemma-3-1b": (262144, 1152, 26, 4, 1, 6912, 32768, 1e6, 1e-6, True),
    }.items()
}

# What differs from Llama's, by the beginning of the names.
LLAMA3 = {"kind": "llama3", "original_length": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {
    "head_dim": 256,
    "activation": "gelu_tanh",
    "norm_plus_one": True,
    "post_norms": True,
    "attention_scale": 256**-0.5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-3.1": {"rope_scaling": LLAMA3 | {"factor": 8.0}},
    "llama-3.2": {"rope_scaling": LLAMA3 | {"factor": 32.0}},
    "mistral": {"family": "mistral", "window": 4096, "window_layers": tuple(range(32))},
    "qwen2.5": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 128},
    "smollm3": {"family": "smollm3", "nope_layers": tuple(range(3, 36, 4))},
    "gemma-2": {
        **GEMMA,
        "family": "gemma2",
        "window": 4096,
        "window_layers": tuple(range(0, 26, 2)),
        "embedding_scale": 2304**0.5,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
    },
    "gemma-3": {
        **GEMMA,
        "family": "gemma3_text",
        "qk_norm": True,
        "window": 512,
        "window_layers": tuple(layer for layer in range(26) if layer % 6 != 5),
        "embedding_scale": 1152**0.5,
        "local_rope_theta": 1e4,
    },
}
for name, shape in LLAMA.items():
    for beginning, differences in FAMILIES.items():
        if name.startswith(beginning):
            shape.update(differences)

GPT: dict[str, dict[str, Any]] = {
    name: {"vocab_size": 50257, "dim": dim, "layers": layers, "heads": heads, "max_length": 1024}
    for name, (dim, layers, heads) in {
        "gpt2": (768, 12, 12),
        "gpt2-medium": (1024, 24, 16),
        "gpt2-large": (1280, 36, 20),
        "gpt2-xl": (1600, 48, 25),
    }.items()
}
