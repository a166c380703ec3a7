"""Models and tokenizers to folders that transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.lm.gpt import GPT
from finetune.lm.io import hf_gpt2, hf_llama, hf_tokenizer
from finetune.lm.io.config import TokenIds
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import checkpoint


def model(trained: Llama | GPT, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` opens: weights in the parameters' dtype,
    configuration, and the tokenizer's files if one is given.

    Each file is written whole or not at all. The model's own token ids take precedence over the tokenizer's: they may
    be lists. UserError if the disk refuses.
    """
    folder = Path(folder)
    ids: dict[str, Any] = (tokenizer.token_ids() if tokenizer else {}) | trained.token_ids
    ids = (
        dict.fromkeys(TokenIds.__struct_fields__) | ids
    )  # transformers would fill in the family's own for missing ones
    dtype = trained.embed.weight.dtype
    if isinstance(trained, GPT):
        config, pairs = hf_gpt2.write_config(trained.config, dtype), hf_gpt2.hf_tensors(trained)
    else:
        config, pairs = hf_llama.write_config(trained.config, dtype), hf_llama.hf_tensors(trained)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in pairs}
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "config.json", config | ids)
    generation = {"_from_model_config": True, **ids, **trained.generation_ids}
    checkpoint.write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        hf_tokenizer.write(tokenizer, folder)
    checkpoint.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def tokenizer(trained: Tokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer.from_pretrained` opens."""
    hf_tokenizer.write(trained, Path(folder))
