"""Files of a model folder with wrong types, numbers out of range and half of their text: each one clear line."""

import copy
import json
import math

import pytest
import torch
from small_gguf import TEXT, tiny

from finetune.errors import UserError
from finetune.lm.chat_template import worker
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io import load, save
from finetune.lm.tokenizer import Tokenizer
from finetune.peft.adapters import load_adapter, save_adapter
from finetune.peft.lora import apply_lora

WRONG = [None, True, -1, 1.5, math.inf, math.nan, 1 << 40, 10**30, "x", "\ud800", [], ["a"], {}, {"content": 3}]
BROKEN = [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"a":' * 100_000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model, gpt and adapter, small."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train([TEXT], 300)
    model = tiny(vocab_size=300, dim=16, layers=1, heads=2, kv_heads=1, hidden=16)
    save.model(model, root / "model", tokenizer)
    torch.manual_seed(0)
    save.model(GPT(GPTConfig(300, 16, 1, 2, 64)), root / "gpt", tokenizer)
    adapted = copy.deepcopy(model)
    apply_lora(adapted, rank=2)
    save_adapter(adapted, root / "adapter", "x")
    return root


def read_tokenizer(root):
    tokenizer = load.tokenizer(root / "model")
    tokenizer.decode(tokenizer.encode("def f(x): 12"))
    if tokenizer.chat_template is not None:
        tokenizer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def read_adapter(root):
    load_adapter(tiny(vocab_size=300, dim=16, layers=1, heads=2, kv_heads=1, hidden=16), root / "adapter")


READERS = {
    "model/config.json": lambda root: load.llama(root / "model"),
    "gpt/config.json": lambda root: load.gpt(root / "gpt"),
    "model/generation_config.json": lambda root: load.llama(root / "model"),
    "model/tokenizer_config.json": read_tokenizer,
    "model/tokenizer.json": read_tokenizer,
    "adapter/adapter_config.json": read_adapter,
}
LEAST_REFUSED = 0.25  # of the changes: most keys of a config are nothing to us


@pytest.mark.parametrize("name", READERS)
def test_a_wrong_value_is_one_line(folder, name):
    file = folder / name
    whole = file.read_text()
    values = json.loads(whole)
    changed = [json.dumps(values | {key: wrong}).encode() for key in values for wrong in WRONG]
    if name.endswith("tokenizer.json"):
        changed = changed[:: len(WRONG) // 5]  # each takes long
        changed += [
            json.dumps(values | {"model": values["model"] | {key: wrong}}).encode()
            for key in values["model"] for wrong in WRONG[::2]
        ]  # fmt: skip
    refused = []
    try:
        for content in [*changed, *BROKEN]:
            file.write_bytes(content)
            try:
                READERS[name](folder)
            except UserError as error:
                refused.append(str(error))
        for content in BROKEN:
            file.write_bytes(content)
            with pytest.raises(UserError):
                READERS[name](folder)
    finally:
        file.write_text(whole)
        worker.stop()
    assert not [text for text in refused if "\n" in text or len(text) > 600]
    assert len(refused) > LEAST_REFUSED * len(changed)


def test_merges_without_their_prefix_do_not_end_the_process(folder):
    file = folder / "model" / "tokenizer.json"
    whole = file.read_text()
    values = json.loads(whole)
    values["model"]["continuing_subword_prefix"] = "##"
    try:
        file.write_text(json.dumps(values))
        with pytest.raises(UserError, match="lacks the prefix '##' of its model"):
            load.tokenizer(folder / "model")
    finally:
        file.write_text(whole)
