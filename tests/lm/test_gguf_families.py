"""Every family as a GGUF file: read back equal, and computed alike by transformers' reader and by llama.cpp."""

import numpy as np
import pytest
import torch
from small_families import FAMILIES, family
from small_gguf import TEXT

from finetune.errors import UserError
from finetune.lm.io import gguf_write, load, save
from finetune.lm.io.gguf import ARCHITECTURES, GGUFModel
from finetune.lm.tokenizer import Tokenizer

every = pytest.mark.parametrize("case", FAMILIES)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


def written(folder, case, tokenizer, form="bf16"):
    model, path = family(case), folder / "m.gguf"
    gguf_write.write(model, tokenizer, path, form)
    return model, path


def test_all_architectures_are_covered():
    written = {gguf_write.architecture_of(family(case).config) for case in FAMILIES}
    assert written == set(ARCHITECTURES)


@every
def test_there_and_back(tmp_path, tokenizer, case):
    model, path = written(tmp_path, case, tokenizer)
    again = load.llama(path)
    for field, value in vars(model.config).items():
        same = gguf_write.effective(model.config, field), gguf_write.effective(again.config, field)
        assert same[0] == pytest.approx(same[1]) if isinstance(value, float) else same[0] == same[1], field
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    save.model(again, tmp_path / "folder", tokenizer)  # the families' own keys have a place for it
    assert load.llama_config(tmp_path / "folder") == again.config


def test_a_note_where_llama_cpp_differs(tmp_path, tokenizer):
    notes = gguf_write.write(family("mistral"), tokenizer, tmp_path / "m.gguf", "f16")
    assert notes == [
        "llama.cpp has no sliding window for this architecture: beyond 5 tokens it sees more than the model did"
    ]


def test_what_an_architecture_lacks_is_refused(tmp_path, tokenizer):
    from dataclasses import replace

    for case, change, match in (
        (
            "qwen2",
            {"window": 4, "window_layers": (0, 1, 2, 3)},
            "window = 4 cannot be written: .* qwen2 has None there",
        ),
        ("smollm3", {"nope_layers": (0,)}, r"nope_layers = \(0,\) cannot be written"),
        ("gemma3", {"attention_scale": 0.5}, "attention_scale = 0.5 cannot be written"),
        ("llama", {"nope_layers": (1,)}, r"nope_layers = \(1,\) cannot"),
        ("llama", {"attention_softcap": 50.0}, "attention_softcap = 50.0 cannot"),
        ("llama", {"family": "mystery"}, "models of type mystery are not written"),
    ):
        model = family(case)
        model.config = replace(model.config, **change)
        with pytest.raises(UserError, match=match):
            gguf_write.write(model, tokenizer, tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())


def test_joined_queries_keys_and_values(tmp_path, tokenizer, monkeypatch):
    """Some converters write q, k and v below each other as one tensor."""
    model, path = written(tmp_path, "llama", tokenizer)
    file = GGUFModel(path)
    joined = {}
    for name in file.tensor_infos:
        layer, _, part = name.rpartition(".attn_")
        if part in ("q.weight", "k.weight", "v.weight"):
            joined.setdefault(f"{layer}.attn_qkv.weight", []).append(file.tensor(name))
        else:
            joined[name] = [file.tensor(name)]
    whole = {name: np.concatenate(parts) for name, parts in joined.items()}
    assert len(whole) == len(file.tensor_infos) - 2 * model.config.layers
    monkeypatch.setattr(file, "tensor_infos", {n: file.tensor_infos.get(n) or file.tensor_infos["blk.0.attn_q.weight"]
                                               for n in whole})  # fmt: skip
    monkeypatch.setattr(file, "tensor", whole.__getitem__)
    again = dict(file.tensors())
    for name, parameter in model.named_parameters():
        assert torch.equal(again[name], parameter), name


@pytest.mark.peer
@pytest.mark.parametrize("case", ["llama", "qwen2"])
@torch.no_grad()
def test_logits_of_transformers(tmp_path, tokenizer, case):
    """By its own reader of GGUF, from our file. It passes over scaling, windows and head sizes."""
    from transformers import AutoModelForCausalLM

    model, path = written(tmp_path, case, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    row = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
    wanted = model(row)
    assert (wanted - theirs(row).logits).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.peer
@pytest.mark.long
@every
@torch.no_grad()
def test_logits_and_greedy_tokens_of_llama_cpp(tmp_path, tokenizer, case):
    """Every family in llama.cpp: the same ids, logits within its fp16 arithmetic, and the same greedy continuation as
    long as the two best tokens are further apart than that."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="make longtest installs llama-cpp-python")
    model, path = written(tmp_path, case, tokenizer, "f16")
    theirs = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    text = "def f(x):\n    return 12 + x  # naïve 日本"
    assert theirs.tokenize(text.encode(), add_bos=True, special=True) == load.tokenizer(path).encode(text)
    assert theirs.metadata["general.architecture"] == gguf_write.architecture_of(model.config)
    # It has no sliding window for Mistral's architecture, as the export says: only rows within the window agree.
    count = model.config.window if case == "mistral" else 40
    ids = torch.randint(300, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    bound = 0.01 * model(torch.tensor([ids])).abs().max().item()
    theirs.eval(ids)
    for _ in range(1 if case == "mistral" else 12):
        ours = model(torch.tensor([ids]))[0].numpy()
        found = np.array(theirs.scores[: len(ids)])
        assert np.abs(ours - found).max() <= bound
        second, best = np.sort(ours[-1])[-2:]
        if best - second > 2 * bound:
            assert ours[-1].argmax() == found[-1].argmax()
        ids.append(int(ours[-1].argmax()))
        theirs.eval(ids[-1:])
    theirs.close()


@pytest.mark.peer
@pytest.mark.long
@pytest.mark.parametrize("form", gguf_write.FORMATS)
@torch.no_grad()
def test_forms_in_llama_cpp(tmp_path, tokenizer, form):
    """Each form of weights; llama.cpp multiplies quantized ones with activations rounded to 8 bits."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="make longtest installs llama-cpp-python")
    _, path = written(tmp_path, "llama", tokenizer, form)
    theirs = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    ids = torch.randint(300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    theirs.eval(ids)
    ours = load.llama(path)(torch.tensor([ids]))[0].numpy()
    wrong = ours - np.array(theirs.scores[:40])
    assert np.sqrt((wrong**2).mean()) <= 0.08 * np.sqrt((ours**2).mean())
    theirs.close()
