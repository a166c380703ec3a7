"""A module's settings: a dataclass whose field comments are its documentation and whose fields are its options.

@dataclass
class Config(config.Config):
    steps: int = 300
    lr: float = bounded(1e-3, above=0)  # peak learning rate
    # where the rows come from
    data: Path | None = None
    env_arg: tuple[str, ...] = ()  # may be given several times

    @classmethod
    def toy(cls):
        return cls(steps=40)
"""

import ast
import dataclasses
import inspect
import io
import math
import operator
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from finetune.errors import UserError, nearest

RESERVED = {"toy", "out", "resume", "json", "help", "accept_changes", "dry_run"}  # options of `run` itself


TEXTS = tuple[str, ...]  # the type of an option that may be given several times
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Bound:
    """The values that a number may take. Without `infinite` it must be finite."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False

    def broken(self, value: float) -> str:
        """Why a value is outside the bound, as text to follow its name; empty if it is inside."""
        if math.isnan(value) or (math.isinf(value) and not self.infinite):
            return "is not a finite number"
        for limit, holds, words in (
            (self.at_least, operator.ge, "small: it must be at least"),
            (self.above, operator.gt, "small: it must be above"),
            (self.at_most, operator.le, "large: it must be at most"),
            (self.below, operator.lt, "large: it must be below"),
        ):
            if limit is not None and not holds(value, limit):
                return f"is too {words} {_written(limit)}"
        return ""

    def __str__(self) -> str:
        """The bound as text, `≥ 0, < 1`. Limits that only exclude absurd values are omitted."""
        signs = (("≥", self.at_least), (">", self.above), ("≤", self.at_most), ("<", self.below))
        return ", ".join(f"{sign} {_written(limit)}" for sign, limit in signs if limit is not None and abs(limit) < 1e6)


def bounded(
    default: float | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
) -> Any:
    """A field of a Config whose values are checked: `lr: float = bounded(1e-3, above=0)`. A subclass that gives the
    field another default keeps the bound. Every number must be finite, unless `infinite`."""
    return dataclasses.field(default=default, metadata={"bound": Bound(at_least, at_most, above, below, infinite)})


@dataclass
class Config:
    """Settings of every module. A module's Config derives from this, sets its own defaults and adds its own fields."""

    steps: int = bounded(100, at_least=0, at_most=10**9)  # number of training steps
    seed: int = bounded(0, at_least=0, at_most=2**63 - 1)  # the same seed gives the same run
    # CPU threads; 0 = the physical cores available to this process
    threads: int = bounded(0, at_least=0, at_most=1024)
    checkpoint_every: int = bounded(100, at_least=1, at_most=10**9)  # steps between two checkpoints

    def __post_init__(self) -> None:
        """Checks every field. UserError names the first setting of a wrong type or outside its bound."""
        for name, (kind, optional, bound) in _rules(type(self)).items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            if kind is Path and isinstance(value, str):
                setattr(self, name, Path(value))
            elif not _is_a(value, kind):
                raise UserError(f"--{dashed(name)} {value!r}: expected {_type_name(kind, optional)}")
            elif kind in (int, float) and (wrong := bound.broken(value)):
                raise UserError(f"--{dashed(name)} {_written(value)} {wrong}")

    def inputs(self) -> dict[str, Path]:
        """The files and folders that the result depends on, by setting. Their hashes are kept with the run."""
        found = {name: getattr(self, name) for name, (kind, *_) in _rules(type(self)).items() if kind is Path}
        return {name: path for name, path in found.items() if path is not None}

    @classmethod
    def toy(cls) -> "Config":
        """The small setting, used by --toy: learns something real in less than a minute."""
        raise NotImplementedError(f"{cls.__module__}.{cls.__qualname__} needs a classmethod toy()")


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Field:
    name: str
    type: Any  # int, float, str, bool, Path, Literal[...] or tuple[str, ...]
    optional: bool  # `none` is accepted
    default: Any
    help: str
    bound: Bound
    group: str  # the `# --- …` line above it: an algorithm's name, or empty

    @property
    def type_name(self) -> str:
        return _type_name(self.type, self.optional)


def dashed(name: str) -> str:
    return name.replace("_", "-")


def describe(cls: type[Config]) -> list[Field]:
    """The fields of a Config in order, each with the comment behind it or on the lines above it. A line `# --- NAME`
    in the class opens a group of settings, `# ---` closes it."""
    comments: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            for name, (text, group) in _comments(base).items():
                comments[name] = (text or comments.get(name, ("", ""))[0], group)
    fields = []
    for f in dataclasses.fields(cls):
        kind, optional, bound = _rules(cls)[f.name]
        if kind not in (int, float, str, bool, Path, TEXTS) and typing.get_origin(kind) is not Literal:
            raise TypeError(f"{cls.__qualname__}.{f.name}: a field of type {kind} cannot be an option")
        if f.name in RESERVED:
            raise TypeError(f"{cls.__qualname__}.{f.name}: the name is taken by an option of `run`")
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        text, group = comments.get(f.name, ("", ""))
        fields.append(Field(f.name, kind, optional, default, text, bound, group))
    return fields


def given(cls: type[Config], argv: list[str], also: Iterable[str] = ()) -> dict[str, Any]:
    """The values that `--key value`, `--key=value`, `--flag`, `--no-flag` and `--flag true` name, converted to their
    fields' types. A field of several texts takes one for each time that its key is given.

    UserError names an unknown key (and the nearest known one, of the settings or of `also`, the command's own options),
    a missing value, or a value of the wrong type.
    """
    fields = {f.name: f for f in describe(cls)}
    values: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"'{word}' is not an option: settings are written --key value")
        key, equals, text = word[2:].partition("=")
        name = key.replace("-", "_")
        negated = name.startswith("no_") and name not in fields and name[3:] in fields
        field = fields.get(name[3:] if negated else name)
        if field is None or (negated and field.type is not bool):
            raise UserError(f"unknown option --{key}{nearest(dashed(name), [*map(dashed, fields), *also])}")
        if field.type is bool and not equals and (negated or not words or words[0].lower() not in BOOLEANS):
            values[field.name] = not negated
            continue
        if negated:
            raise UserError(f"--{key} takes no value")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{key} needs a value: {field.type_name}")
            text = words.pop(0)
        value = _convert(field, text)
        values[field.name] = (*values.get(field.name, ()), *value) if field.type == TEXTS else value
    return values


def parse(cls: type[C], base: C, argv: list[str]) -> C:
    """`base` with the settings of argv applied."""
    return dataclasses.replace(base, **given(cls, argv))


def to_json(cfg: Config) -> dict[str, Any]:
    """The settings as JSON values: a path as its text, an infinity as "inf", several texts as a list."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, Path) or value in (float("inf"), -float("inf")) else value

    return {name: plain(value) for name, value in dataclasses.asdict(cfg).items()}


def from_json(cls: type[C], values: dict[str, Any]) -> C:
    """The inverse of `to_json`. UserError if the fields are no longer those of the class."""
    fields = {f.name: f for f in describe(cls)}
    if set(values) != set(fields):
        names = ", ".join(sorted(set(values) ^ set(fields)))
        raise UserError(f"the saved settings are of another version of this module ({names} differ): start a new run")
    infinite = ("inf", "-inf")
    typed: dict[str, Any] = {k: float(v) if fields[k].type is float and v in infinite else v for k, v in values.items()}
    lists = {k: tuple(v) for k, v in typed.items() if fields[k].type == TEXTS and isinstance(v, list)}
    return cls(**typed | lists)


def _rules(cls: type[Config]) -> dict[str, tuple[Any, bool, Bound]]:
    """(type, optional, bound) of every field. A subclass inherits a bound unless it declares another."""
    bounds: dict[str, Bound] = {}
    for base in reversed(cls.__mro__):
        for name, f in vars(base).get("__dataclass_fields__", {}).items():
            if "bound" in f.metadata:
                bounds[name] = f.metadata["bound"]
    hints = typing.get_type_hints(cls)
    return {f.name: (*_unwrap(hints[f.name]), bounds.get(f.name, Bound())) for f in dataclasses.fields(cls)}


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind == TEXTS:
        return isinstance(value, tuple) and all(isinstance(text, str) for text in value)
    return isinstance(value, kind)


def _type_name(kind: Any, optional: bool) -> str:
    if typing.get_origin(kind) is Literal:
        text = "|".join(str(choice) for choice in typing.get_args(kind))
    elif kind == TEXTS:
        text = "str, repeatable"
    else:
        text = {Path: "path"}.get(kind, kind.__name__)
    return f"{text}|none" if optional else text


def _written(value: float) -> str:
    """A number without a redundant `.0`: 0 rather than 0.0; 1e-05 is unchanged."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """(X, True) for Optional[X], (X, False) for X."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        if len(inner) == 1:
            return inner[0], True
    return hint, False


def _convert(field: Field, text: str) -> Any:
    if field.optional and text.lower() == "none":
        return None
    try:
        if field.type is bool:
            return BOOLEANS[text.lower()]
        if typing.get_origin(field.type) is Literal:
            return {str(choice): choice for choice in typing.get_args(field.type)}[text]
        if field.type == TEXTS:
            return (text,)
        return field.type(text)
    except (ValueError, KeyError):
        hint = nearest(text, map(str, typing.get_args(field.type))) if typing.get_origin(field.type) is Literal else ""
        raise UserError(f"--{dashed(field.name)} {text!r}: expected {field.type_name}{hint}") from None


def _comments(cls: type) -> dict[str, tuple[str, str]]:
    """(comment, group) of each annotated field in the class's own source."""
    source = textwrap.dedent(inspect.getsource(cls))
    comment: dict[int, str] = {}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment[token.start[0]] = token.string.lstrip("#").strip()
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            code.update(range(token.start[0], token.end[0] + 1))
    groups = {line: text.lstrip("- ") for line, text in comment.items() if text.startswith("---")}
    found: dict[str, tuple[str, str]] = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        lines: list[str] = []
        above = node.lineno - 1
        while above in comment and above not in code and above not in groups:
            lines.insert(0, comment[above])
            above -= 1
        if node.end_lineno in comment:
            lines.append(comment[node.end_lineno])
        group = groups.get(max((line for line in groups if line < node.lineno), default=0), "")
        found[node.target.id] = (" ".join(lines), group)
    return found
