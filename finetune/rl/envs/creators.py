"""From a name to an environment: a gymnasium id, or a class or function of a module or of a file.

    CartPole-v1                 an id that gymnasium knows
    my_module:MyEnv-v0          an id that is registered when my_module is imported
    my_module:MyEnv             a class of my_module, or a function that returns an environment
    folder/my_file.py:MyEnv     the same of a file

Keyword arguments are texts, `key=value`, as the command line has them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from finetune.errors import UserError, nearest
from finetune.runs import own_code

RESERVED = {"id": "--env", "max_episode_steps": "--max-episode-steps", "disable_env_checker": "", "vector_kwargs": ""}
WORDS = {"true": True, "false": False, "none": None, "null": None}


def arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from texts `key=value`. A value is read as JSON, else as a Python literal, else it is a text:
    false, 3, 0.5, [1,2], 8x8. UserError names a text without a key, and a key that is given twice."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.isidentifier()):
            raise UserError(f"--env-arg {text!r}: write key=value, such as is_slippery=false")
        if key in found:
            raise UserError(f"--env-arg: '{key}' is there twice")
        if key in RESERVED:
            use = RESERVED[key]
            raise UserError(f"--env-arg: '{key}' is none of the environment's own{f': use {use}' * bool(use)}")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


@dataclass(frozen=True)
class Creator:
    """What makes an environment. `make` takes the keyword arguments."""

    make: Callable[..., Any]
    called: Any  # the class or function itself, or where gymnasium finds it
    own: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments that a registered id comes with
    time_limit: int | None = None  # of a registered id

    @property
    def of_gymnasium(self) -> bool:
        """Whether it is one of gymnasium's own environments."""
        return isinstance(self.called, str) and self.called.startswith("gymnasium.envs.")


def find(name: str) -> Creator:
    """The creator of the environment of this name. UserError says why there is none."""
    import gymnasium

    place, colon, what = name.rpartition(":")
    if not colon:
        if name.endswith(".py"):
            module = own_code.module(name, name)
            raise UserError(f"'{name}' names no environment: {_offers(module, name)}")
        return _registered(name, name)
    module = own_code.module(name, place)
    if what in gymnasium.registry:
        return _registered(name, what)
    if callable(made := getattr(module, what, None)):
        return Creator(made, made)
    if hasattr(module, what):
        raise UserError(f"'{name}' is {type(made).__name__}, neither a class nor a function that makes an environment")
    try:
        return _registered(name, what)  # an id without its version
    except UserError:
        hint = nearest(what, [*gymnasium.registry, *vars(module)])
        raise UserError(
            f"gymnasium has no environment '{name}', and '{place}' has nothing of this name: "
            f"{_offers(module, place)}{hint}"
        ) from None


def _registered(name: str, id_: str) -> Creator:
    import gymnasium

    def make(**kwargs: Any) -> Any:  # -1: without TimeLimit
        return gymnasium.make(id_, max_episode_steps=-1, disable_env_checker=True, **kwargs)

    try:
        spec = gymnasium.spec(id_)
    except gymnasium.error.Error as e:
        hint = nearest(id_, gymnasium.registry)
        raise UserError(f"gymnasium has no environment '{name}'{hint or f': {e}'}") from None
    return Creator(make, spec.entry_point, spec.kwargs, spec.max_episode_steps)


def create(name: str, creator: Creator, args: Mapping[str, Any]) -> Any:
    """An environment without a time limit. UserError says why it cannot be made."""
    import gymnasium

    _check_arguments(name, creator, args)
    given = f" with {', '.join(f'{k}={v!r}' for k, v in args.items())}" if args else ""
    try:
        made = creator.make(**args)
    except gymnasium.error.Error as e:
        raise UserError(f"'{name}' cannot be made{given}: {str(e).splitlines()[0]}") from None
    except ModuleNotFoundError as e:
        cause = e.__cause__ if isinstance(e.__cause__, Exception) else e
        raise UserError(f"'{name}' cannot be made{given}: {own_code.exception(cause)}") from None
    except Exception as e:
        raise UserError(f"'{name}' cannot be made{given}: {own_code.exception(e)}") from e
    missing = [method for method in ("reset", "step") if not callable(getattr(made, method, None))]
    if missing:
        raise UserError(f"'{name}' makes {type(made).__name__}, which has no {' and no '.join(missing)}")
    return made


def _check_arguments(name: str, creator: Creator, args: Mapping[str, Any]) -> None:
    """UserError names arguments that the constructor does not take, and required ones that are missing."""
    try:
        called = creator.called
        if isinstance(called, str):
            module, _, attribute = called.partition(":")
            called = getattr(importlib.import_module(module), attribute)
        parameters = inspect.signature(called).parameters
    except Exception:  # it shows when the environment is made
        return
    kinds = inspect.Parameter
    named = {p.name: p for p in parameters.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    accepted = f"it takes {', '.join(named)}" if named else "it takes none"
    if not any(p.kind is kinds.VAR_KEYWORD for p in parameters.values()):
        for key in args:
            if key not in named:
                hint = nearest(key, named)
                raise UserError(f"--env-arg {key}: '{name}' has no argument of this name: {accepted}{hint}")
    needed = [k for k, p in named.items() if p.default is kinds.empty and k not in args and k not in creator.own]
    if needed:
        raise UserError(f"'{name}' needs {', '.join(needed)}: --env-arg {needed[0]}=…; {accepted}")


def _offers(module: ModuleType, place: str) -> str:
    """What a module has to offer, for an error message."""
    import gymnasium

    classes = [
        name for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, gymnasium.Env) and value.__module__ == module.__name__
    ]  # fmt: skip
    return f"it has {', '.join(f'{place}:{c}' for c in classes)}" if classes else "it has no class of environments"
