"""For the tests of adapters: a Llama of two small layers, and adapters that do something."""

from dataclasses import replace

import torch
from small_gguf import TEXT, tiny

from finetune.lm.io import save
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.peft.adapters import save_adapter
from finetune.peft.lora import adapters, apply_lora
from finetune.runs import registry, run_folder

CONFIG = LlamaConfig(vocab_size=50, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=64)
TOKENS = torch.arange(40).view(2, 20) % 50


def small_model(**changes):
    torch.manual_seed(0)
    return Llama(replace(CONFIG, **changes))


def adapter_run(folder):
    """folder/base, a small model with a tokenizer, and folder/RUN, as a run of sft on it leaves its adapter."""
    torch.manual_seed(0)
    model = tiny()
    save.model(model, folder / "base", Tokenizer.train([TEXT], 300))
    apply_lora(model, 2, 64)
    shake(model)
    save_adapter(model, folder / "RUN" / "model", str(folder / "base"))
    info = registry.find("sft")
    run_folder.begin(info, registry.load(info).Config(), False).write(folder / "RUN")


def shake(model):
    """B away from 0, so that the adapters do something."""
    g = torch.Generator().manual_seed(1)
    for _, layer in adapters(model):
        for part in layer.parts.values():
            part.lora_B.data += torch.randn(part.lora_B.shape, generator=g) * 0.05
            if part.magnitude is not None:
                part.magnitude.data *= 1 + 0.2 * torch.rand(part.magnitude.shape, generator=g)
