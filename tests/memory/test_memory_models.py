"""Any model from the command line: where it is from, what it cannot be, which cards it fits on, what is searched."""

import dataclasses
import json
import re
import shlex
from itertools import pairwise

import pytest

from finetune.cli import main
from finetune.errors import UserError
from finetune.lm import presets
from finetune.memory import Setup, cards, models, predict, search, shape_of
from finetune.memory.cli import budget_of
from finetune.memory.models import switches
from finetune.memory.optimizers import OPTIMIZERS
from finetune.memory.show import pictured
from finetune.runs import registry

MISTRAL = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = MISTRAL | {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 256}  # fmt: skip


def asked(capsys, *words):
    """What `memory WORDS --json` prints."""
    assert main(["memory", *map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert main(["memory", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


# --- Where a model is from


def test_a_config_and_a_folder(tmp_path, capsys, monkeypatch):
    """The file, its folder and the hub's copy are one model."""
    from finetune.lm.io import hub

    (tmp_path / "m").mkdir()
    for file in (tmp_path / "any.json", tmp_path / "m" / "config.json"):
        file.write_text(json.dumps(MISTRAL))
    monkeypatch.setattr(hub, "fetch_config", lambda name: tmp_path / "m" / "config.json")
    monkeypatch.chdir(tmp_path)
    found = [asked(capsys, name, "--dtype", "bf16") for name in ("any.json", "m", tmp_path / "m", "mistralai/M")]
    assert {each["parameters"] for each in found} == {7_241_732_096}
    assert len({json.dumps(each["terms"]) for each in found}) == 1
    assert found[0]["shape"]["window_layers"] == 32
    assert found[0]["setup"]["seq"] == 2048


def test_a_model_by_its_sizes(capsys):
    sizes = ["--layers", 32, "--dim", 4096, "--hidden", 11008, "--max-length", 2048]
    assert asked(capsys, *sizes)["parameters"] == 6_738_415_616
    assert asked(capsys, *sizes[:4])["parameters"] == 6_738_415_616, "Llama's own rule for the MLP"
    gpt = asked(capsys, "--model", "gpt", "--layers=12", "--dim=768", "--vocab-size=50257", "--seq", 1024)
    assert gpt["parameters"] == 124_439_808
    assert "needs --layers and --dim" in refused(capsys, "--layers", 3)
    assert "the model comes first" in refused(capsys, "--seq", 3)
    assert "a gpt has no such choice" in refused(capsys, "--layers", 3, "--dim", 64, "--model", "gpt", "--qk-norm")
    assert "--heads" in refused(capsys, "--layers", 3, "--dim", 64, "--heads", -1)


def test_a_gguf_file(tmp_path, capsys):
    """Inference has the file's bytes by type, training the weights in --dtype, inference with a --dtype too."""
    from small_gguf import tiny, write

    file, model = tmp_path / "m.gguf", tiny(dim=64, hidden=96)
    write(file, model, "Q8_0")
    count = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    terms = {t["name"]: t["bytes"] for t in asked(capsys, file, "--optimizer", "none")["terms"]}
    assert terms["weights, Q8_0"] == matrices // 32 * 34
    assert terms["weights, F32"] == 4 * (count - matrices)
    cache = 2 * 2 * 2 * 16 * 2 * 128  # keys and values, layers, KV heads, head size, fp16, tokens
    assert terms["KV cache"] == cache
    assert terms["peak"] == sum(value for name, value in terms.items() if name != "peak")
    assert asked(capsys, file, "--optimizer", "none", "--dtype", "bf16")["terms"][0]["bytes"] == 2 * count
    assert asked(capsys, file)["terms"][0]["bytes"] == 4 * count
    assert main(["memory", str(file), "--optimizer", "none"]) == 0
    assert "in the file's own types" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"model_type": "mixtral"}, "mixtral"),
        ("config.json", {"model_type": "phi3"}, "phi3"),
        ("config.json", {"hidden_size": 3}, "model_type"),
        ("config.json", "no json", "not JSON"),
        ("config.json", MISTRAL | {"num_hidden_layers": -1}, "num_hidden_layers"),
        ("m.gguf", "no gguf", "GGUF"),
        ("m.bin", "", "neither a config.json, nor a model folder"),
        ("adapter_config.json", {"base_model_name_or_path": "x/y"}, "model_type"),
    ],
)
def test_files_that_are_no_model(name, content, message, tmp_path, capsys):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert message.lower() in refused(capsys, file).lower()


def test_names_that_are_no_model(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    assert "give its base model (owner/base)" in refused(capsys, tmp_path / "adapter")
    assert "there is no nothing.json" in refused(capsys, "nothing.json")
    assert "there is no a/b/c" in refused(capsys, "a/b/c")
    assert "did you mean 'llama-7b'" in refused(capsys, "lama-7b")


def test_the_hub_out_of_reach(capsys, monkeypatch):
    """One question to the hub, then the cache: one line, and no waiting for repeats."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    calls = []

    def offline(url, **_):
        calls.append(url)
        raise OSError("no route")

    def cached(name, file, local_files_only=False):
        calls.append((name, file, local_files_only))
        raise LocalEntryNotFoundError("none\nmore")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    assert "the hub is out of reach" in refused(capsys, "owner/name")
    assert calls[1:] == [("owner/name", "config.json", True)]

    class Answer:
        headers, request = {}, None

    def missing(url, **_):
        raise RepositoryNotFoundError("401", response=Answer())

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", missing)
    assert "nor a model of that name on the hub" in refused(capsys, "owner/name")


# --- Setups that a model cannot have


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gpt2 --seq 4096", "gpt2 has 1,024 positions"),
        ("llama-7b --seq 2049", "llama-7b has 2,048 positions"),
        ("llama-7b --zero 3", "--ranks"),
        ("llama-7b --tp 3", "32 heads, which is no multiple of 3"),
        ("llama-3-8b --tp 16", "8 KV heads, which is no multiple of 16"),
        ("gpt2 --pp 13", "gpt2 has 12 layers"),
        ("llama-7b --lora-rank 4097", "a rank above 4,096 adds nothing"),
        ("llama-3-8b --lora-rank 1025 --lora-targets q,k", "layer k of llama-3-8b"),
        ("llama-7b --prompt 2048 --seq 2048", "no token would be left"),
        ("llama-7b --prefix 1 --seq 2048", "2,048 positions for both"),
        ("llama-7b --lora-targets qkv --lora-rank 2", "no linear layer 'qkv'"),
        ("llama-7b --for 1GB", "context alone takes"),
        ("llama-7b --for 24parsec", "neither a size"),
        ("llama-7b --for H10", "one of RTX 3060"),
        ("llama-7b --for 24 --measure", "one of them"),
        ("llama-7b --measure --tp 2", "--measure is for one rank"),
        ("llama-7b --simulate --tp 2", "--tp 2 is not simulated"),
        ("llama-7b --simulate --optimizer sgd", "AdamW"),
    ],
)
def test_impossible(words, message, capsys):
    assert re.search(message, refused(capsys, *shlex.split(words)))


def test_a_length_that_is_not_given_fits_the_model(capsys):
    assert asked(capsys, "gpt2")["setup"]["seq"] == 1024
    assert asked(capsys, "llama-3-8b")["setup"]["seq"] == 2048


def test_checkpointing_as_a_switch():
    """As sft has it: alone, with true or false, or negated."""
    for words, kind in (
        (["--checkpointing"], "block"), (["--checkpointing", "true"], "block"), (["--checkpointing", "false"], "none"),
        (["--no-checkpointing"], "none"), (["--checkpointing", "selective"], "selective"),
        (["--checkpointing", "--seq", "5"], "block"),
    ):  # fmt: skip
        assert switches(words)[:2] == ["--checkpointing", kind]


def test_modules_keep_their_own_switches(capsys):
    """sft's --checkpointing is a switch of sft."""
    for words, kind in (([], "none"), (["--checkpointing"], "block"), (["--checkpointing", "true"], "block")):
        found = asked(capsys, "sft", "--toy", *words)
        assert found["setup"]["checkpointing"] == kind
        assert len(found["instead"]) > 5
    assert "not for the module 'sft'" in refused(capsys, "sft", "--for", "24")


# --- Cards


def test_cards_and_budgets():
    for card, size in cards.CARDS.items():
        needed = (size << 20) - cards.CONTEXT
        assert next(row["left"] for row in cards.verdicts(needed) if row["card"] == card) == 0
        assert cards.budget(card) == needed
    for text, size in (
        ("24 GiB", 24 << 30),
        ("24", 24 << 30),
        ("24GB", 24e9),
        ("24000 MB", 24e9),
        ("1.5 TiB", 1536 << 30),
    ):
        assert cards.budget(text) == size - cards.CONTEXT
    assert cards.budget("rtx4090") == cards.usable("RTX 4090")
    assert budget_of(["m", "--for", "24", "GiB", "--seq", "5"]) == (["m", "--seq", "5"], cards.budget("24"))
    assert budget_of(["m", "--for=24 GiB"]) == (["m"], cards.budget("24"))
    assert budget_of(["m"]) == (["m"], None)


def test_this_machines_own_card(monkeypatch):
    import types

    import torch

    own = types.SimpleNamespace(name="Some GPU", total_memory=10 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: own)
    last = cards.verdicts(1 << 30)[-1]
    assert last["card"] == "Some GPU (here)"
    assert last["left"] == (9 << 30) - cards.CONTEXT


def test_the_table_says_which_cards_fit(capsys):
    found = asked(capsys, "llama-3-8b", "--dtype", "bf16", "--optimizer", "none")
    peak = found["terms"][-1]["bytes"]
    assert {row["card"] for row in found["cards"] if row["left"] >= 0 and row["card"] in cards.CARDS} == {
        card for card in cards.CARDS if cards.usable(card) >= peak
    }
    assert main(["memory", "llama-3-8b", "--dtype", "bf16", "--optimizer", "none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("RTX 4090") and "fits" in line for line in lines)
    assert any(line.startswith("T4") and "too small" in line for line in lines)


def test_two_totals_with_offload(capsys):
    assert main(["memory", "llama-7b", "--dtype", "bf16", "--offload", "optimizer"]) == 0
    assert "The host needs 87.86 GiB" in capsys.readouterr().out  # 14 bytes of each of 6,738,415,616 parameters
    found = asked(capsys, "llama-7b", "--dtype", "bf16", "--offload", "optimizer")
    assert found["host_bytes"] == 14 * found["parameters"]
    assert {term["name"] for term in found["terms"] if term["host"]} == {"gradients", "optimizer states"}


# --- The search


def test_costs_are_ordered_as_their_causes():
    shape = shape_of(presets.LLAMA["llama-3-8b"])
    lora = Setup(dtype="bf16", lora_rank=8, seq=512)

    def cost(**changes):
        return search.cost(shape, dataclasses.replace(lora, **changes))

    plain = cost()
    assert cost(checkpointing="block") > plain < cost(quantized="nf4_double")
    assert cost(batch=8) < plain < cost(lora_rank=0)
    assert cost(dtype="fp32") > 1.9 * plain
    assert cost(lora_rank=0, optimizer="adamw8bit") < cost(lora_rank=0)
    inference = Setup(dtype="bf16", optimizer="none", seq=512)
    costs = [
        search.cost(shape, dataclasses.replace(inference, **more)) for more in ({}, {"batch": 8}, {"kv_dtype": "fp8"})
    ]
    assert costs[1] < costs[2] < costs[0]


def test_checkpointing_costs_a_forward_pass():
    """4 forward passes instead of 3 where everything is trained, at a length where bytes do not matter."""
    shape = shape_of(presets.LLAMA["llama-3-8b"])
    setup = Setup(dtype="bf16", batch=256, seq=8192)
    ratio = search.cost(shape, dataclasses.replace(setup, checkpointing="block")) / search.cost(shape, setup)
    assert ratio == pytest.approx(4 / 3, abs=0.01)


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-0.5b", "gemma-3-1b"])
@pytest.mark.parametrize("room", ["T4", "24 GiB", "H100 80 GB"])
def test_what_is_found_fits_and_nothing_that_fits_is_cheaper(name, room):
    model, room = models.named(name), cards.budget(room)
    setup = Setup(seq=1024)
    found = search.search(model, setup, set(), room)
    assert 1 <= len(found) <= 3
    assert all(b.cost > a.cost / search.SAME for a, b in pairwise(found))
    for each in found:
        assert predict(model.shape, each.setup)[-1].bytes == each.peak <= search.MARGIN * room
        assert each.setup.seq == 1024
    cheapest = min(
        search.cost(model.shape, best[0])
        for candidate in search.candidates(setup, set())
        if (best := search.fitting(model, candidate, set(), int(search.MARGIN * room)))
    )
    assert found[0].cost < search.SAME * cheapest * 1.0001


def test_what_is_given_stays():
    model = models.named("llama-3-8b")
    given = {"optimizer", "lora_rank", "checkpointing", "batch"}
    setup = Setup(optimizer="adamw8bit", lora_rank=32, checkpointing="block", batch=2)
    for each in search.search(model, setup, given, cards.budget("24")):
        assert all(getattr(each.setup, name) == getattr(setup, name) for name in given)
    full = search.search(model, Setup(), {"lora_rank"}, cards.budget("H200"))
    assert {each.setup.lora_rank for each in full} == {0}


def test_nothing_fits(capsys):
    message = refused(capsys, "llama-3-70b", "--for", "T4")
    assert "no setting of llama-3-70b fits" in message
    assert "--quantized nf4_double" in message


def test_the_commands_are_those_settings(tmp_path, capsys, monkeypatch):
    """Each printed command, run as it is, is refused by nobody and plans the same step."""
    from finetune.memory.cli import plan

    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(SMALL))
    for name, room in (("m", "2GiB"), ("llama-3-8b", "24 GiB"), ("m/config.json", "2GiB")):
        found = asked(capsys, name, "--seq", "128", "--for", room)
        assert found
        ours = 0
        for each in found:
            words = shlex.split(each["command"])
            assert words[:3] == ["python", "-m", "finetune"]
            if words[3:5] == ["run", "sft"]:
                ours += 1
                shape, setup = plan("sft", words[5:])
                assert predict(shape_of(shape), setup)[-1].bytes == pytest.approx(each["peak"], rel=0.01)
            else:
                again = asked(capsys, *words[4:])
                assert again["setup"] == each["setup"]
                assert again["terms"][-1]["bytes"] == each["peak"]
        assert bool(ours) == (name == "m"), "sft needs weights"


def test_a_search_of_inference(capsys):
    found = asked(capsys, "llama-2-7b", "--optimizer", "none", "--for", "RTX 3060")
    assert {each["setup"]["optimizer"] for each in found} == {"none"}
    assert all(each["peak"] <= cards.usable("RTX 3060") for each in found)
    assert {"int8", "nf4_double"} <= {each["setup"]["quantized"] for each in found}, "16 bits do not fit"


# --- What is shown


def test_the_usage_names_every_form(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["memory"]) == 0
    out = capsys.readouterr().out
    for word in (
        "config.json",
        "FOLDER",
        "OWNER/NAME",
        "FILE.gguf",
        "--layers",
        "--for",
        *OPTIMIZERS,
        "--tp",
        "--kv-heads",
    ):
        assert word in out, word


@pytest.mark.parametrize("words", ["qwen3-8b --dtype bf16", "gemma-3-1b --tp 1 --pp 2", "llama-3-8b --for 24",
                                   "gpt2-xl --tp 5 --optimizer muon", "gpt2 --optimizer none", ""])  # fmt: skip
def test_eighty_columns(words, monkeypatch, capsys):
    """But for commands, which are one line to copy."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["memory", *shlex.split(words)]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 80 or line.startswith("   python -m finetune"), line


def test_alternatives_are_possible(capsys):
    """Each option of "the peak would be", given as it is printed, has that peak; none that is refused is offered."""
    for name in ("gemma-2-2b", "gpt2"):
        offered = asked(capsys, name, "--seq", 512)["instead"]
        assert ("--loss full" in offered) == (name == "gpt2")
        for option, peak in offered.items():
            assert asked(capsys, name, "--seq", 512, *option.split())["terms"][-1]["bytes"] == peak
    assert "the logits of gemma-2-2b have a soft cap" in refused(capsys, "gemma-2-2b", "--loss", "full")


def test_pictures_stay_in_their_folder():
    for name in ("/etc/config.json", "../x", "owner/name", models.GIVEN, "a.b.gguf"):
        path = pictured(name)
        assert path.parent.as_posix() == "output/memory"
        assert path.suffix == ".png"
    assert pictured("gpt2").name == "gpt2.png"


def test_every_preset_has_a_table(capsys):
    for name in models.PRESETS:
        assert asked(capsys, name, "--dtype", "bf16")["terms"][-1]["name"] == "peak"
    assert not set(models.PRESETS) & {info.name for info in registry.modules()}


def test_a_setup_knows_its_optimizers():
    with pytest.raises(UserError, match="is none of"):
        Setup(optimizer="adam")
    for name in OPTIMIZERS:
        assert predict(shape_of(presets.GPT["gpt2"]), Setup(optimizer=name, seq=8))[-1].bytes > 0
