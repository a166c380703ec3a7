"""Settings as options, and modules found by their module.toml."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from finetune.errors import UserError
from finetune.runs import config, registry

FIXTURES = Path(__file__).parents[1] / "fixtures" / "modules"


@dataclass
class Config(config.Config):
    steps: int = 7
    lr: float = 1e-3  # peak learning rate
    # where the rows
    # come from
    data: Path | None = None  # a file
    kind: Literal["a", "beta"] = "a"
    packing: bool = True
    name: str = "x#y"  # a text with a # in it
    # --- SAC (2018)
    tau: float = 0.005  # share of the new weights
    # --- TD3
    # noise of the
    noise: float = 0.2  # target
    # ---
    last: int = 1
    arg: tuple[str, ...] = ()  # may be given several times


def parse(*argv):
    return config.parse(Config, Config(), list(argv))


def test_values_get_their_fields_types():
    cfg = parse("--lr", "2e-4", "--data=rows.jsonl", "--kind", "beta", "--no-packing", "--steps", "0", "--name", "a b")
    assert cfg == Config(lr=2e-4, data=Path("rows.jsonl"), kind="beta", packing=False, steps=0, name="a b")
    assert parse("--packing", "--data", "none", "--checkpoint_every", "3") == Config(checkpoint_every=3)
    assert parse("--packing=false").packing is False
    assert parse("--packing", "false", "--steps", "3") == Config(packing=False, steps=3)
    assert parse("--packing", "true").packing is True


def test_an_option_of_several_texts_collects_them_in_order():
    cfg = parse("--arg", "a=1", "--steps", "3", "--arg=b=x y", "--arg", "a=1")
    assert cfg.arg == ("a=1", "b=x y", "a=1")
    assert cfg.steps == 3
    assert json.loads(json.dumps(config.to_json(cfg))) == config.to_json(cfg)
    assert config.from_json(Config, config.to_json(cfg)) == cfg
    assert parse().arg == ()
    (field,) = (f for f in config.describe(Config) if f.name == "arg")
    assert field.type_name == "str, repeatable"
    with pytest.raises(UserError, match="--arg needs a value"):
        parse("--arg", "--steps")
    for wrong in ("a=1", ("a", 1), ["a"]):
        with pytest.raises(UserError, match=r"--arg .*: expected str, repeatable"):
            Config(arg=wrong)


def test_comments_are_the_help():
    found = {f.name: f.help for f in config.describe(Config)}
    assert found["lr"] == "peak learning rate"
    assert found["data"] == "where the rows come from a file"
    assert found["seed"] == "the same seed gives the same run"
    assert found["name"] == "a text with a # in it"
    assert found["kind"] == ""
    assert found["noise"] == "noise of the target"


def test_a_line_of_comment_opens_a_group():
    groups = {f.name: f.group for f in config.describe(Config)}
    assert (groups["seed"], groups["name"], groups["last"]) == ("", "", "")
    assert (groups["tau"], groups["noise"]) == ("SAC (2018)", "TD3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lrr", "1"], "unknown option --lrr; did you mean 'lr'"),
        (["--pack"], "unknown option --pack"),
        (["lr", "1"], "'lr' is not an option"),
        (["--lr"], "--lr needs a value: float"),
        (["--lr", "--steps", "3"], "--lr needs a value"),
        (["--lr", "fast"], "--lr 'fast': expected float"),
        (["--lr", "nan"], "--lr nan is not a finite number"),
        (["--steps", "1.5"], "--steps '1.5': expected int"),
        (["--steps", "-1"], "--steps -1 is too small: it must be at least 0"),
        (["--checkpoint-every", "0"], "--checkpoint-every 0 is too small"),
        (["--kind", "bta"], "--kind 'bta': expected a|beta; did you mean 'beta'"),
        (["--packing=maybe"], "--packing 'maybe': expected bool"),
        (["--no-packing=true"], "--no-packing takes no value"),
        (["--no-lr"], "unknown option --no-lr"),
    ],
)
def test_bad_options(argv, message):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert message in str(error.value).replace("did you mean --", "did you mean ")


def test_json_round_trip():
    cfg = Config(data=Path("a/b"), packing=False)
    assert config.from_json(Config, config.to_json(cfg)) == cfg
    with pytest.raises(UserError, match=r"another version of this module .extra differ"):
        config.from_json(Config, {**config.to_json(cfg), "extra": 1})


def test_reserved_and_unsupported_fields():
    for name, kind in (("resume", bool), ("json", str), ("sizes", list)):
        cls = dataclasses.make_dataclass(
            "Other", [(name, kind, dataclasses.field(default=None))], bases=(config.Config,)
        )
        cls.__module__ = __name__
        with pytest.raises((TypeError, OSError)):
            config.describe(cls)


# --- registry


def test_modules_are_found_by_their_toml(monkeypatch):
    monkeypatch.setenv("FINETUNE_MODULES", str(FIXTURES))
    (info,) = registry.modules()
    assert (info.name, info.group, info.folder.name) == ("tinynet", "fixture/tiny", "tinynet")
    assert registry.load(info).Config.toy().steps == 12
    with pytest.raises(UserError, match=r"unknown module 'tinynt'.*tinynet"):
        registry.find("tinynt")
    with pytest.raises(UserError, match=r"unknown module 'zebra'.*list"):
        registry.find("zebra")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('title = { en = "x", zh = "y" }', "missing required field `summary`"),
        ("title = ", r"module\.toml: "),
        (b"\xff", r"module\.toml: "),
    ],
)
def test_a_bad_toml_is_named(tmp_path, monkeypatch, text, message):
    folder = tmp_path / "a" / "b" / "broken"
    folder.mkdir(parents=True)
    (folder / "module.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setenv("FINETUNE_MODULES", str(tmp_path))
    with pytest.raises(UserError, match=message):
        registry.modules()


def test_a_module_without_code_or_package(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b" / "broken"
    folder.mkdir(parents=True)
    (folder / "module.toml").write_text((FIXTURES / "fixture/tiny/tinynet/module.toml").read_text())
    monkeypatch.setenv("FINETUNE_MODULES", str(tmp_path))
    with pytest.raises(UserError, match=r"'broken' has no .*main.py"):
        registry.load(registry.find("broken"))
    (folder / "code").mkdir()
    (folder / "code" / "main.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(UserError, match="needs the package 'a_package_that_nobody_has': pip install"):
        registry.load(registry.find("broken"))


def test_a_linked_module_is_the_same_module(tmp_path, monkeypatch):
    """Its classes are not made a second time: `isinstance` and what a test replaces still hold."""
    monkeypatch.setenv("FINETUNE_MODULES", str(FIXTURES))
    first = registry.load(registry.find("tinynet"))
    folder = tmp_path / "a/b/tinynet"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(FIXTURES / "fixture/tiny/tinynet")
    monkeypatch.setenv("FINETUNE_MODULES", str(tmp_path))
    info = registry.find("tinynet")
    assert info.folder == folder
    assert registry.load(info) is first


@dataclass
class Bounded(config.Config):
    steps: int = 5  # another default keeps the bound of the base class
    lr: float = config.bounded(1e-3, above=0)
    dropout: float = config.bounded(0.0, at_least=0, below=1)
    clip: float = config.bounded(1.0, above=0, infinite=True)
    rank: int = config.bounded(8, at_least=1, at_most=4096)
    kind: Literal["a", "b"] = "a"
    data: Path | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "--steps -1 is too small: it must be at least 0"),
        ({"lr": 0.0}, "--lr 0 is too small: it must be above 0"),
        ({"lr": float("inf")}, "--lr inf is not a finite number"),
        ({"clip": float("nan")}, "--clip nan is not a finite number"),
        ({"dropout": 1.0}, "--dropout 1 is too large: it must be below 1"),
        ({"rank": 5000}, "--rank 5000 is too large: it must be at most 4096"),
        ({"rank": 8.0}, "--rank 8.0: expected int"),
        ({"rank": True}, "--rank True: expected int"),
        ({"lr": "1"}, "--lr '1': expected float"),
        ({"kind": "c"}, "--kind 'c': expected a|b"),
        ({"data": 3}, "--data 3: expected path|none"),
        ({"seed": 2**63}, "--seed 9223372036854775808 is too large"),
    ],
)
def test_a_bound_is_declared_with_its_field_and_holds_however_the_setting_comes(values, message):
    for make in (lambda: Bounded(**values), lambda: dataclasses.replace(Bounded(), **values)):
        with pytest.raises(UserError) as error:
            make()
        assert message in str(error.value)
    saved = config.to_json(Bounded()) | values
    with pytest.raises(UserError, match="--"):
        config.from_json(Bounded, saved)


def test_an_infinite_setting_survives_json_and_a_path_may_be_text():
    cfg = Bounded(clip=float("inf"), data="rows.jsonl")
    text = json.dumps(config.to_json(cfg), allow_nan=False)
    assert config.from_json(Bounded, json.loads(text)) == cfg
    assert cfg.inputs() == {"data": Path("rows.jsonl")}
    assert [str(f.bound) for f in config.describe(Bounded) if f.name in ("lr", "dropout")] == ["> 0", "≥ 0, < 1"]


@pytest.mark.parametrize("info", registry.modules(), ids=lambda info: info.name)
def test_every_number_of_every_module_is_bounded(info):
    fields = [f for f in config.describe(registry.load(info).Config) if f.type in (int, float)]
    assert fields
    assert not [f.name for f in fields if f.bound == config.Bound()]
    assert not [f.name for f in fields if f.type is int and f.bound.at_most is None and f.bound.below is None]
