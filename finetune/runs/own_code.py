"""Code of the user's: a module by its name or by its file, and its exceptions on one line.

my_module                   a module that Python finds, or a file of this name in the current folder
folder/my_file.py           a file; it may import others from its folder
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from finetune.errors import UserError

LIBRARY = Path(__file__).parents[1]


def module(name: str, place: str) -> ModuleType:
    """The module at a place, its name or its file, for what is called `name`. UserError says why there is none."""
    path = Path(place)
    if not (place.endswith(".py") or "/" in place):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as e:
            missing = e.name or "?"
            path = Path(place.replace(".", "/") + ".py")  # the current folder may not be on Python's path
            if not (place == missing or place.startswith(f"{missing}.")):
                raise UserError(f"'{name}' cannot be made: {exception(e)}") from None
            if not path.is_file():
                raise UserError(f"'{name}': Python finds no module '{missing}' (current folder, PYTHONPATH)") from None
        except Exception as e:
            raise UserError(f"'{name}' cannot be made: {exception(e)}") from e
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"'{name}': there is no file {path}")
    return from_file(name, path)


def from_file(name: str, path: Path) -> ModuleType:
    """A module from its file, once; it may import others from its folder."""
    key = f"finetune_own_{path.stem}_{abs(hash(path)):x}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise UserError(f"'{name}': {path} is not a Python file")
    found = sys.modules[key] = importlib.util.module_from_spec(spec)
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(found)
    except Exception as e:
        del sys.modules[key]
        raise UserError(f"'{name}' cannot be made: {exception(e)}") from e
    return found


def exception(e: Exception) -> str:
    """An exception of the user's code on one line, with file and line."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if LIBRARY not in Path(f.filename).parents]
    own = [f for f in frames if "site-packages" not in f.filename and "<frozen" not in f.filename] or frames
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    text = " ".join(str(e).split())
    return f"{type(e).__name__}{': ' * bool(text)}{text[:200]}{place}"
