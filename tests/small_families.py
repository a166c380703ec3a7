"""Tiny random models of each family, with weights that bf16 holds exactly, for the tests of GGUF and of the engine."""

import torch

from finetune.lm.llama import Llama, LlamaConfig

GEMMA = {
    "family": "gemma3_text",
    "layers": 7,
    "head_dim": 32,
    "qk_norm": True,
    "window": 5,
    "window_layers": (0, 1, 2, 3, 4, 6),
    "activation": "gelu_tanh",
    "norm_plus_one": True,
    "post_norms": True,
    "embedding_scale": 8.0,
    "attention_scale": 32**-0.5,
    "local_rope_theta": 10000.0,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "tied": True,
}
LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_length": 32}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 32}
FAMILIES = {
    "llama": {},
    "llama biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "tied": False},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "linear rope": {"rope_scaling": {"kind": "linear", "factor": 2.5}},
    "mistral": {"family": "mistral", "window": 5, "window_layers": (0, 1, 2, 3), "tied": False},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen2 yarn": {"family": "qwen2", "qkv_bias": True, "rope_scaling": YARN, "tied": False},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 32, "norm_eps": 1e-6, "rope_theta": 1e6},
    "qwen3 yarn": {"family": "qwen3", "qk_norm": True, "rope_scaling": YARN | {"attention_factor": 1.5}},
    "smollm3": {"family": "smollm3", "nope_layers": (3,), "rope_theta": 2e6},
    "gemma2": GEMMA
    | {
        "family": "gemma2",
        "qk_norm": False,
        "window_layers": (0, 2, 4, 6),
        "local_rope_theta": 0.0,
        "rope_theta": 1e4,
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
    },
    "gemma3": GEMMA,
    "gemma3 linear": GEMMA | {"rope_scaling": {"kind": "linear", "factor": 8.0}, "window_layers": (0, 2, 4)},
}


def family(name):
    """The model of a case; the order of its parameters and the seed make its weights."""
    shape = {"vocab_size": 300, "dim": 64, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 96, "max_length": 128}
    model = Llama(LlamaConfig(**(shape | FAMILIES[name])))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.dim() == 1 else 0.15)
            if each.endswith("norm.weight") and not model.config.norm_plus_one:
                values += 1
            parameter.copy_((values * 256).round() / 256)
    return model
