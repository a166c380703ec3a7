"""A small random Llama, and GGUF files of it written with the gguf package, for the tests of what reads them."""

import json

import gguf
import numpy as np
import torch

from finetune.lm.llama import Llama, LlamaConfig

TEXT = "def f(x):\n    return 12 + x  # hello\n\n1. naïve 日本語 🙂\n" * 20


def permute(weight, heads):
    """What llama.cpp's converter does to q and k: halves → interleaved pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


TO_GGUF = {
    "embed": "token_embd", "norm": "output_norm", "head": "output", "attn_norm": "attn_norm", "mlp_norm": "ffn_norm",
    "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output",
    "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
}  # fmt: skip


def write(path, model, kind="F32", arch="llama", tokenizer=None, extra=None, pre="gpt-2", last=None):
    """Writes a Llama as GGUF with the gguf package. `last`: what the last token is called instead."""
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (extra or {}).items():
        writer.kv_data[0].pop(key, None)
        adders[type(value)](key, value)
    if tokenizer is not None:
        vocabulary = tokenizer.backend.get_vocab()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        tokens = sorted(vocabulary, key=vocabulary.get)
        writer.add_token_list([*tokens[:-1], last or tokens[-1]])
        writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
        merges = json.loads(tokenizer.backend.to_str())["model"]["merges"]
        writer.add_token_merges(
            [" ".join(pair) for pair in merges if last is None or tokens[-1] not in ("".join(pair), *pair)]
        )
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
    for name, parameter in model.named_parameters():
        part = name.removesuffix(".weight")
        layer, part = part.split(".", 2)[1:] if part.startswith("blocks") else ("", part)
        values = parameter.detach().numpy()
        if part in ("attn.q", "attn.k"):
            values = np.ascontiguousarray(permute(values, config.heads if part == "attn.q" else config.kv_heads))
        name = f"blk.{layer}.{TO_GGUF[part]}.weight" if layer else f"{TO_GGUF[part]}.weight"
        if kind != "F32" and values.ndim == 2:
            type_ = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(**changes):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 300,
        "dim": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "hidden": 96,
        "max_length": 128,
        "rope_theta": 5e4,
    }
    model = Llama(LlamaConfig(**(shape | {"rope_theta": 5e4} | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model
