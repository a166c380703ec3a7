"""Loading: the kind of model, its shape and its tokenizer, from folders and GGUF files."""

import json

import pytest
import torch
from small_gguf import TEXT, tiny, write

from finetune.errors import UserError
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io import load, save
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer


@torch.no_grad()
def test_the_kind_of_a_model_is_read_from_its_files(tmp_path):
    models = {"llama": tiny(), "gpt2": GPT(GPTConfig(300, 16, 1, 2, 64))}
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    for name, model in models.items():
        save.model(model, tmp_path / name, Tokenizer.train([TEXT], 300))
        again = load.model(tmp_path / name)
        assert type(again) is type(model)
        assert load.config(tmp_path / name) == again.config == model.config
        assert torch.equal(again(tokens), model(tokens))
        assert load.tokenizer(tmp_path / name).vocab_size == 300
    file = write(tmp_path / "m.gguf", models["llama"])
    assert isinstance(load.model(file), Llama)
    assert load.config(file) == load.llama_config(file) == models["llama"].config
    with pytest.raises(UserError, match="model_type 'gpt2' cannot be read as a Llama"):
        load.llama(tmp_path / "gpt2")


def test_what_is_not_a_model_is_refused(tmp_path):
    save.model(tiny(), tmp_path / "m")
    raw = json.loads((tmp_path / "m/config.json").read_text())
    for kind in ("gptj", None, ["llama"]):
        (tmp_path / "m/config.json").write_text(json.dumps(raw | {"model_type": kind}))
        with pytest.raises(UserError, match=r"model_type.*supported are llama, mistral"):
            load.model(tmp_path / "m")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / load.ADAPTER_CONFIG).write_text('{"base_model_name_or_path": "somewhere"}')
    assert load.adapter_base(tmp_path / "adapter") == "somewhere"
    with pytest.raises(UserError, match=r"is an adapter, not a model: give its base model \(somewhere\)"):
        load.config(tmp_path / "adapter")
