"""`finetune export`: what is written is read back equal, by our reader, by gguf-py and by llama.cpp."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from small_gguf import TEXT, tiny

from finetune.errors import UserError
from finetune.export import export
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io import gguf_write, load, save
from finetune.lm.io.gguf import GGUFModel
from finetune.lm.io.gguf_types import TYPES, quantize
from finetune.lm.layers import RopeScaling
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import display
from finetune.runs.run_folder import Saved


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


def written(tmp_path, model, tokenizer, form="f16", name="m.gguf"):
    gguf_write.write(model, tokenizer, tmp_path / name, form)
    return tmp_path / name


@pytest.mark.parametrize("form", gguf_write.FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back(tmp_path, tokenizer, form, tied):
    """The tensors are those of `quantize`; norms are exact; what decides the logits has 8 bits at least."""
    model = tiny(tied=tied)
    path = written(tmp_path, model, tokenizer, form)
    again = load.llama(path)
    assert again.config == model.config
    kind = gguf_write.FORMATS[form][0]
    logits = "embed.weight" if tied else "head.weight"
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        kept = "F32" if one.dim() == 1 else "Q8_0" if kind in ("Q4_0", "Q4_1") and name == logits else kind
        stored = TYPES[kept].decode(quantize(one.detach().numpy(), kept).reshape(-1, TYPES[kept].nbytes))
        assert np.array_equal(other.detach().numpy().ravel(), stored.ravel()), name
    back = load.tokenizer(path)
    assert back.encode(TEXT) == tokenizer.encode(TEXT)
    assert back.special_tokens == tokenizer.special_tokens
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert back.render_text(chat)[0] == tokenizer.render_text(chat)[0]


def test_opened_by_gguf_py(tmp_path, tokenizer):
    model = tiny()
    model.token_ids = {"eos_token_id": [2, 7]}
    reader = gguf.GGUFReader(written(tmp_path, model, tokenizer, "q8_0"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    vocabulary = tokenizer.backend.get_vocab()
    wanted = {
        "general.architecture": "llama",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.vocab_size": 300,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.get),
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 297,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: fields[key] for key in wanted} == wanted
    assert "{% generation %}" in tokenizer.chat_template  # which other engines do not know
    assert "{% generation %}" not in fields["tokenizer.chat_template"]
    tensors = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert len(tensors) == len(list(model.parameters()))
    assert tensors["blk.1.ffn_down.weight"] == ("Q8_0", [96, 64])
    assert tensors["blk.0.attn_norm.weight"] == ("F32", [64])


def test_rows_that_are_no_whole_blocks_are_f16(tmp_path, tokenizer):
    path = written(tmp_path, tiny(dim=48, heads=4), tokenizer, "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"


def test_padded_vocabulary(tmp_path, tokenizer):
    """A row of the embedding without a token gets a placeholder, as llama.cpp wants as many tokens as rows."""
    model = tiny(vocab_size=320)
    path = written(tmp_path, model, tokenizer)
    assert load.llama(path).config == model.config
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    assert tokens[300:302] == ["[PAD300]", "[PAD301]"]
    assert load.tokenizer(path).encode(TEXT) == tokenizer.encode(TEXT)
    with pytest.raises(UserError, match="a token 299, the model's embedding only 290 rows"):
        written(tmp_path, tiny(vocab_size=290), tokenizer)


def test_refused_by_name(tmp_path, tokenizer):
    with pytest.raises(UserError, match="GPT-2 is not written as GGUF"):
        written(tmp_path, GPT(GPTConfig(vocab_size=300, dim=16, layers=1, heads=2)), tokenizer)
    model = tiny()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3, 5] = 1e6
    with pytest.raises(
        UserError, match=r"blk.1.ffn_up.weight has weights up to 1e\+06, too large .* of F16; bf16 holds"
    ):
        written(tmp_path, model, tokenizer)
    written(tmp_path, model, tokenizer, "bf16")
    cut = Tokenizer.train([TEXT], 300)
    from tokenizers import normalizers, pre_tokenizers

    cut.backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r'pre-tokenizer has no name in GGUF: {"type": "Whitespace"}'):
        written(tmp_path, tiny(), cut)
    cut = Tokenizer.train([TEXT], 300)
    cut.backend.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"that of gpt-2 with .* normalizer .*Lowercase"):
        written(tmp_path, tiny(), cut)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_disk_is_checked_and_a_file_is_whole_or_not_there(tmp_path, tokenizer, monkeypatch):
    path = written(tmp_path, tiny(), tokenizer)
    before = path.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"m.gguf needs 162.6 kB, .* has 1.* free: free some space"):
        written(tmp_path, tiny(), tokenizer)
    monkeypatch.undo()

    def broken(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf_write.write(tiny(), tokenizer, path, "q8_0", report=broken)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run's folder with its model, as sft leaves it."""
    folder = tmp_path / "run"
    save.model(tiny(), folder / "model", tokenizer)
    as_run(folder)
    return folder


def as_run(folder):
    """Makes a folder that of a run."""
    Saved("0" * 16, "sft", True, {}, [], "", {}, {}, [], {}, None).write(folder)


def test_export_of_a_run_a_folder_and_a_file(tmp_path, run, capfd):
    from finetune.cli import main

    out = tmp_path / "new" / "m.gguf"
    assert main(["export", str(run), "--gguf", "f16", "--out", str(out), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found == {
        "path": str(out),
        "bytes": out.stat().st_size,
        "format": "f16",
        "architecture": "llama",
        "notes": [],
    }
    assert gguf.GGUFReader(out).fields["general.name"].contents() == "run"
    again = tmp_path / "again.gguf"
    assert main(["export", str(out), "--gguf", "f16", "--out", str(again)]) == 0  # a .gguf file itself
    for one, other in zip(load.llama(out).parameters(), load.llama(again).parameters(), strict=True):
        assert torch.equal(one, other)
    before = again.read_bytes()
    for words, match in (
        ([str(run), "--out", str(again)], "exists: choose another name, or replace it with --force"),
        ([str(run), "--out", str(tmp_path)], "the name of a GGUF file ends in .gguf"),
        ([str(run), "--out", str(again), "--gguf", "q2_k"], "'q2_k' is not one of"),
        ([str(run), "--out", str(tmp_path / "x.gguf"), "--base", "y"], "is not an adapter"),
    ):
        capfd.readouterr()
        assert main(["export", *words]) == 2
        assert match in capfd.readouterr().err
    assert again.read_bytes() == before
    assert main(["export", str(run / "model"), "--out", str(again), "--force"]) == 0
    assert again.read_bytes() != before


def test_export_of_an_adapter_is_the_merged_model(tmp_path, tokenizer):
    from finetune.peft import adapters, lora

    base = tmp_path / "base"
    save.model(tiny(), base, tokenizer)
    model = load.llama(base)
    lora.apply_lora(model, rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapter = tmp_path / "run" / "model"
    adapters.save_adapter(model, adapter, base=str(base))
    as_run(tmp_path / "run")
    out = tmp_path / "m.gguf"
    export(str(tmp_path / "run"), str(out), "bf16", console=display.console(stderr=True))
    row = torch.arange(20)[None]
    lora.merge(model)
    with torch.no_grad():
        wanted, found, plain = (each(row) for each in (model, load.llama(out), load.llama(base)))
    assert (wanted - found).abs().max() < 0.1 < (wanted - plain).abs().max()


def test_llama3_rule_there_and_back(tmp_path, tokenizer):
    """Its parameters are not in the file: they are recovered from the tensor of factors, or refused."""
    from finetune.lm.io import gguf_rope
    from finetune.lm.io.gguf_file import GGUFFile

    class Factors(GGUFFile):
        def __init__(self, factors):
            super().__init__("m.gguf", ({}, {gguf_rope.FREQS: None}))
            self.factors = factors

        def tensor(self, name):
            return self.factors

    for theta, dim, scaling in (
        (500000.0, 64, RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)),  # Llama 3.2 1B
        (500000.0, 128, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),  # Llama 3.1 8B
        (500000.0, 128, RopeScaling("llama3", 8.0, 4096, 1.0, 4.0)),
        (10000.0, 64, RopeScaling("llama3", 4.0, 1000, 1.0, 8.0)),
        (10000.0, 16, RopeScaling("llama3", 8.0, 64, 1.0, 4.0)),
    ):
        factors = gguf_rope.llama3_factors(scaling, theta, dim).astype(np.float32)
        assert factors.min() == 1.0
        assert factors.max() == scaling.factor
        assert gguf_rope.read(Factors(factors), "llama", theta, dim, 8192) == scaling
        doubled = gguf_rope.llama3_factors(  # only ratios of the last three count
            RopeScaling("llama3", scaling.factor, 2 * scaling.original_length, 2.0, 2 * scaling.high_freq_factor),
            theta,
            dim,
        )
        assert np.allclose(doubled, factors, rtol=1e-6)
    assert gguf_rope.read(Factors(np.ones(8, np.float32)), "llama", 1e4, 16, 64) == RopeScaling()
    wrong = np.linspace(1, 8, 32).astype(np.float32)
    with pytest.raises(UserError, match="does not follow the rule of Llama 3"):
        gguf_rope.read(Factors(wrong), "llama", 5e5, 64, 8192)
    with pytest.raises(UserError, match="is not 32 positive numbers"):
        gguf_rope.read(Factors(wrong[:5]), "llama", 5e5, 64, 8192)


def test_rope_scaling_that_llama_cpp_lacks_is_refused():
    from finetune.lm.io import gguf_rope

    for scaling, architecture, match in (
        (RopeScaling("dynamic", 2.0, 64), "llama", "rope scaling dynamic cannot be written"),
        (RopeScaling("llama3", 8.0, 8192), "qwen2", "llama3 cannot be written for the architecture qwen2"),
        (RopeScaling("yarn", 4.0, 64, beta_fast=16.0), "qwen2", "beta_fast 32"),
        (RopeScaling("yarn", 4.0, 64, truncate=False), "qwen2", "truncate = false"),
    ):
        with pytest.raises(UserError, match=match):
            gguf_rope.metadata(scaling, architecture, 1e4, 64)


def test_the_command_line_offers_what_can_be_written():
    from finetune.cli import export as command

    choice = next(parameter.type for parameter in command.params if parameter.name == "form")
    assert list(choice.choices) == list(gguf_write.FORMATS)
    assert {kind for kind, _ in gguf_write.FORMATS.values()} | {"F32"} == {k for k, one in TYPES.items() if one.encode}
    assert all(one.about.endswith(".") for one in TYPES.values())


TEMPLATES = {
    "Llama 3": "{{ bos_token }}{% if tools is not none %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}{% for m in messages %}{{ "
    "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "Mistral": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "Gemma": "{{ bos_token }}{%- for m in messages -%}\n{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' "
    "else m['role']) + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}\n{%- endfor -%}\n"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_templates_are_carried_unchanged(tmp_path, family):
    chat = [{"role": "user", "content": " 日本 'a' {{ b }}"}, {"role": "assistant", "content": "c\n"}]
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.chat_template = TEMPLATES[family]
    read = load.tokenizer(written(tmp_path, tiny(), tokenizer))
    assert read.chat_template == TEMPLATES[family]
    assert read.render_text(chat)[0] == tokenizer.render_text(chat)[0]
    marked = "{%- for m in messages -%} {%- generation -%} {{ m['content'] }} {% endgeneration %} {% endfor %}"
    tokenizer.chat_template = marked
    again = load.tokenizer(written(tmp_path, tiny(), tokenizer, name="marked.gguf"))
    assert again.render_text(chat)[0] == tokenizer.render_text(chat)[0]


def test_the_end_of_a_turn_that_a_file_does_not_name(tmp_path):
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.eos, tokenizer.eos_id = "<|endoftext|>", 0
    file = GGUFModel(written(tmp_path, tiny(), tokenizer))
    assert file.stop_ids() == [0, 2]  # <|im_end|>
