"""Model folders: what is written is whole, what is read is checked."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.errors import UserError
from finetune.lm.io import save, weights
from finetune.lm.llama import Llama, LlamaConfig

NAME = "model.safetensors"


def two_shards(folder):
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    return {"a": "one.safetensors", "b": "two.safetensors"}


def read(folder, index):
    (folder / f"{NAME}.index.json").write_text(json.dumps(index))
    return {name: tensor.clone() for name, tensor in weights.read_safetensors(folder)}


def test_shards_are_read_by_their_index(tmp_path):
    found = read(tmp_path, {"metadata": {"total_size": 20}, "weight_map": two_shards(tmp_path)})
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [1, 1], "b": [0, 0, 0]}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "'../secret.safetensors' is not the name of a file in"),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd' is not the name of a file in"),
        ({"weight_map": {"a": ".."}}, "'..' is not the name of a file in"),
        ({"weight_map": {"a": ""}}, "'' is not the name of a file in"),
        ({"weight_map": {"a": 3}}, r"weight_map\[...\]: expected `str`, got `int`"),
        ({"weight_map": []}, "weight_map is \\[\\]: expected `object`"),
        ({}, "missing required field `weight_map`"),
        ([], "expected `object`, got `array`"),
        ({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}, "lacks c, though"),
        ({"weight_map": {"c": "two.safetensors"}}, "holds b, which .* does not name there"),
        ({"weight_map": {"a": "none.safetensors"}}, "none.safetensors is missing, though"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, message):
    folder = tmp_path / "m"
    folder.mkdir()
    two_shards(folder)
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    with pytest.raises(UserError, match=message) as error:
        read(folder, index)
    assert "\n" not in str(error.value)


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(UserError, match="is not a file"):
        list(weights.read_safetensors(tmp_path))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (torch.ones(2, dtype=torch.int64), torch.float32, "has dtype int64, weights are float32"),
        (torch.ones(2, dtype=torch.bool), torch.float32, "has dtype bool"),
        (torch.ones(2).view(torch.int32), torch.float32, "has dtype int32"),  # a header that lies of the same bytes
        (torch.tensor([1.0, float("nan")]), torch.float32, "holds NaN or infinite numbers"),
        (torch.tensor([1.0, -float("inf")]), torch.bfloat16, "holds NaN or infinite numbers"),
        (torch.tensor([1.0, 1e30]), torch.float16, "holds numbers too large for float16"),
        (torch.ones(3), torch.float32, r"has shape \(3,\), its configuration requires \(2,\)"),
    ],
)
def test_tensors_that_are_no_weights(value, dtype, message):
    with torch.device("meta"):
        model = nn.Linear(1, 2)
    with pytest.raises(UserError, match=f"folder: tensor bias {message}"):
        weights.fill(model, [("bias", value)], dtype, "folder")


def test_a_model_is_written_whole_and_for_everyone_who_may_read_the_folder(tmp_path):
    model = Llama(LlamaConfig(16, dim=8, layers=1, heads=2, kv_heads=1, hidden=8))
    before = os.umask(0o022)
    try:
        save.model(model, tmp_path / "m")
    finally:
        os.umask(before)
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == ["config.json", "generation_config.json", NAME]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o644}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save.model(model, tmp_path / "file" / "m")
