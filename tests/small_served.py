"""Small models with definite answers, and prompts for them: what the tests of the engine share."""

import random

import torch

from finetune.lm.llama import Llama, LlamaConfig
from finetune.peft.adapters import save_adapter
from finetune.peft.lora import adapters, apply_lora

SIZES = {"vocab_size": 100, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 64, "max_length": 128}


def llama(**given):
    return wide(Llama(LlamaConfig(**SIZES | given)))


def wide(model):
    """Weights so large that the likeliest token stands apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.2, generator=generator)
    return model.eval()


def prompts(count=16, seed=0):
    """Of 1 to 39 tokens; a third begins with the same 16."""
    rng = random.Random(seed)
    shared = [rng.randrange(100) for _ in range(16)]
    found = [[rng.randrange(100) for _ in range(rng.randrange(1, 40))] for _ in range(count)]
    return [shared + one[:20] if i % 3 == 0 else one for i, one in enumerate(found)]


def adapter(folder, seed=0, model=None, **given):
    """The folder of an adapter that changes answers."""
    model, g = model or llama(), torch.Generator().manual_seed(seed)
    apply_lora(model, **{"rank": 4, "alpha": 16.0, "generator": g} | given)
    for _, layer in adapters(model):
        for part in layer.parts.values():
            part.lora_B.data.normal_(0, 0.2, generator=g)
    save_adapter(model, folder)
    return folder
