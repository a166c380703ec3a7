"""A module's settings: a dataclass whose field comments are its documentation and whose fields are its options.

@dataclass
class Config(config.Config):
    steps: int = 300
    lr: float = 1e-3  # peak learning rate
    # where the rows come from
    data: Path | None = None

    @classmethod
    def toy(cls):
        return cls(steps=40)
"""

import ast
import dataclasses
import inspect
import io
import math
import textwrap
import tokenize
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from finetune.errors import UserError, nearest

RESERVED = {"toy", "out", "resume", "json", "help"}  # options of `run` itself


@dataclass
class Config:
    """What every module has. A module's Config derives from this, gives its own defaults and adds its own fields."""

    steps: int = 100  # number of training steps
    seed: int = 0  # the same seed gives the same run
    threads: int = 0  # CPU threads; 0 = the physical cores available to this process
    checkpoint_every: int = 100  # steps between two checkpoints

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("seed", 0), ("threads", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{dashed(name)} {getattr(self, name)} is too small: it must be at least {least}")

    @classmethod
    def toy(cls) -> "Config":
        """The small setting: learns something real in seconds."""
        raise NotImplementedError(f"{cls.__module__}.{cls.__qualname__} needs a classmethod toy()")


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Field:
    name: str
    type: Any  # int, float, str, bool, Path or Literal[...]
    optional: bool  # `none` is accepted
    default: Any
    help: str

    @property
    def type_name(self) -> str:
        if typing.get_origin(self.type) is Literal:
            text = "|".join(str(choice) for choice in typing.get_args(self.type))
        else:
            text = {Path: "path"}.get(self.type, self.type.__name__)
        return f"{text}|none" if self.optional else text


def dashed(name: str) -> str:
    return name.replace("_", "-")


def describe(cls: type[Config]) -> list[Field]:
    """The fields of a Config in order, each with the comment behind it or on the lines above it."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments.update(_comments(base))
    hints = typing.get_type_hints(cls)
    fields = []
    for f in dataclasses.fields(cls):
        kind, optional = _unwrap(hints[f.name])
        if kind not in (int, float, str, bool, Path) and typing.get_origin(kind) is not Literal:
            raise TypeError(f"{cls.__qualname__}.{f.name}: a field of type {kind} cannot be an option")
        if f.name in RESERVED:
            raise TypeError(f"{cls.__qualname__}.{f.name}: the name is taken by an option of `run`")
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        fields.append(Field(f.name, kind, optional, default, comments.get(f.name, "")))
    return fields


def given(cls: type[Config], argv: list[str]) -> dict[str, Any]:
    """The values that `--key value`, `--key=value`, `--flag` and `--no-flag` name, converted to their fields' types.

    UserError names an unknown key (and the nearest known one), a missing value, or a value of the wrong type.
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
            raise UserError(f"unknown option --{key}{nearest(dashed(name), map(dashed, fields))}")
        if field.type is bool and not equals:
            values[field.name] = not negated
            continue
        if negated:
            raise UserError(f"--{key} takes no value")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{key} needs a value: {field.type_name}")
            text = words.pop(0)
        values[field.name] = _convert(field, text)
    return values


def parse(cls: type[C], base: C, argv: list[str]) -> C:
    """`base` with the settings that argv gives."""
    return dataclasses.replace(base, **given(cls, argv))


def to_json(cfg: Config) -> dict[str, Any]:
    """The settings as JSON values (a path as its text)."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(cfg).items()}


def from_json(cls: type[C], values: dict[str, Any]) -> C:
    """The inverse of `to_json`. UserError if the fields are no longer those of the class."""
    fields = {f.name: f for f in describe(cls)}
    if set(values) != set(fields):
        names = ", ".join(sorted(set(values) ^ set(fields)))
        raise UserError(f"the saved settings are of another version of this module ({names} differ): start anew")
    typed: dict[str, Any] = {k: Path(v) if fields[k].type is Path and v is not None else v for k, v in values.items()}
    return cls(**typed)


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
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if typing.get_origin(field.type) is Literal:
            return {str(choice): choice for choice in typing.get_args(field.type)}[text]
        value = field.type(text)
        if field.type is float and math.isnan(value):
            raise ValueError(text)
        return value
    except (ValueError, KeyError):
        hint = nearest(text, map(str, typing.get_args(field.type))) if typing.get_origin(field.type) is Literal else ""
        raise UserError(f"--{dashed(field.name)} {text!r}: expected {field.type_name}{hint}") from None


def _comments(cls: type) -> dict[str, str]:
    """Comment of each annotated field in the class's own source."""
    source = textwrap.dedent(inspect.getsource(cls))
    comment: dict[int, str] = {}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment[token.start[0]] = token.string.lstrip("#").strip()
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            code.update(range(token.start[0], token.end[0] + 1))
    found: dict[str, str] = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        lines: list[str] = []
        above = node.lineno - 1
        while above in comment and above not in code:
            lines.insert(0, comment[above])
            above -= 1
        if node.end_lineno in comment:
            lines.append(comment[node.end_lineno])
        if lines:
            found[node.target.id] = " ".join(lines)
    return found
