"""Small models with definite answers, tokenizers and prompts for them: what the tests of the engine share."""

import random

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
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


TEXT = "ein süßer 🙂🙃 Tag, 今日は ½ e\u0301 naïve\n\tab abc abab <|end|>"


def byte_level():
    return Tokenizer.train([TEXT] * 3, vocab_size=290)


def sentencepiece():
    """Words with ▁ for the space before them, and bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁ein", "▁Tag", "▁", "a", "b", "ab", "▁ab"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos="<s>", eos="</s>")
