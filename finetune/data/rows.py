"""Rows of conversations from files: JSON, CSV and Parquet, compressed or not, one file or a folder of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune.data import conversations
from finetune.data.conversations import FORMS, Conversation
from finetune.errors import UserError, nearest
from finetune.runs import reading

LIMIT = 4 << 30  # bytes of a file, and of what it holds once unpacked
Placed = Iterator[tuple[str, Any]]  # ("line 3", row)
# What any form of rows reads: a Parquet file's other columns (images, embeddings) stay unread.
COLUMNS = {*conversations.PARSED, *conversations.UNUSED, "prompt", "completion", "instruction", "input", "output",
           "system", "train_on"} - {"image"}  # fmt: skip


def read(path: str | Path, form: str | None = None, train_on: str = "answers") -> tuple[list[Conversation], str]:
    """(conversations, what the rows are in words) of a file, or of a folder's files in the order of their names.

    `form`: a name of conversations.FORMS, or None to find each row's form by its keys. UserError names the file, the
    line or row, and what is wrong.
    """
    check_form(form)
    path = reading.home_path(path)
    found: list[Conversation] = []
    forms: Counter[str] = Counter()
    files = files_of(path)
    for file in files:
        for where, row in placed(file):
            try:
                name, conversation = conversations.read_any(row, form, train_on)
            except ValueError as error:
                raise UserError(f"{file}, {where}: {error}") from None
            found.append(conversation)
            forms[name] += 1
    if not found:
        raise UserError(f"{path} holds no rows: each must have one of the forms {conversations.described()}")
    said = ", ".join(
        f"{count:,} row{'s'[: count > 1]} of the form {name} ({FORMS[name].summary})" for name, count in forms.items()
    )
    return found, said + (f" in {len(files)} files: {', '.join(f.name for f in files)}" if path.is_dir() else "")


def check_form(form: str | None) -> None:
    """UserError unless it is a name of FORMS or None."""
    if form is not None and form not in FORMS:
        raise UserError(f"--form '{form}': the forms are {', '.join(FORMS)}{nearest(form, FORMS)}")


def files_of(path: Path) -> list[Path]:
    """The path itself, or the files of known endings directly in the folder."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if ending(file) and file.is_file())
    if not found:
        raise UserError(f"{path} is a folder with no file that ends in {', '.join(FILES)}")
    return found


def ending(path: Path) -> str:
    """The ending of FILES that the file's name has, perhaps before .gz; empty if none."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    return next((e for e in FILES if name.removesuffix(".gz").endswith(e) and not (packed and e == ".parquet")), "")


def placed(path: Path, every_column: bool = False) -> Placed:
    """The rows of a file, each with its place in words. Of Parquet only COLUMNS are read unless `every_column`."""
    raw, end = reading.file_bytes(path, LIMIT), ending(path)
    if not end:
        raise UserError(f"{path}: the kind of file is told by its ending: {', '.join(FILES)}, or these texts with .gz")
    raw = unpacked(path, raw) if path.suffix.lower() == ".gz" else raw
    yield from parquet(path, raw, every_column) if end == ".parquet" else FILES[end][1](path, raw)


def unpacked(path: Path, raw: bytes) -> bytes:
    """The contents of a gzip file, of at most LIMIT bytes."""
    try:
        found = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): fetch it again") from None
    if len(found) > LIMIT:
        raise UserError(f"{path} unpacks to more than the {LIMIT:,} bytes that are read")
    return found


def json_lines(path: Path, raw: bytes) -> Placed:
    """One JSON object on each line; blank lines are skipped."""
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield f"line {number}", json_value(path, line, f"line {number}", "each line must be one object")


def json_list(path: Path, raw: bytes) -> Placed:
    """A list of objects; a file that does not begin with [ is read by lines, as many of this ending are."""
    text = raw.removeprefix(b"\xef\xbb\xbf")
    if not text.lstrip().startswith(b"["):
        yield from json_lines(path, raw)
        return
    for number, row in enumerate(json_value(path, text, "", "it must be a list of objects"), start=1):
        yield f"row {number}", row


def json_value(path: Path, raw: bytes, where: str, fix: str) -> Any:
    """The value of JSON text; UserError names the place."""
    place = f"{path}, {where}" if where else f"{path}"
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: byte {error.start + 1} is not UTF-8: save it as UTF-8") from None
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if where else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{place}: not JSON ({error.msg} at {at}): {fix}") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deeply: {fix}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{place}: {error}") from None


def table(separator: str) -> Callable[[Path, bytes], Placed]:
    """The reader of a table of texts whose first line names the columns. An empty cell is no value; lists (messages,
    tools, …) are written as JSON."""

    def rows(path: Path, raw: bytes) -> Placed:
        lines = csv.reader(io.StringIO(reading.decode(raw, path), newline=""), delimiter=separator, strict=True)
        csv.field_size_limit(2**31 - 1)
        try:
            heads = next(lines, [])
            if len(set(heads)) < len(heads):
                raise UserError(f"{path}, line 1: two columns have the same name")
            began = lines.line_num + 1
            for cells in lines:
                if len(cells) not in (0, len(heads)):
                    raise UserError(f"{path}, line {began}: {len(cells)} cells under {len(heads)} names of columns")
                if cells:
                    yield f"line {began}", {name: cell for name, cell in zip(heads, cells, strict=True) if cell}
                began = lines.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}, line {lines.line_num}: {error}: it is not a table of this kind") from None

    return rows


def parquet(path: Path, raw: bytes, every_column: bool = False) -> Placed:
    """Parquet, as Hugging Face's datasets save it: text columns, or lists of structs. A struct's field that a row lacks
    is null there, so null is no value."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'finetune-lab[data]'") from None
    number, size = 0, 0
    try:
        with pyarrow.BufferReader(raw) as source, ParquetFile(source) as file:
            known = [name for name in file.schema_arrow.names if every_column or name in COLUMNS]
            if not known:
                names = ", ".join(map(repr, file.schema_arrow.names[:5]))
                raise UserError(f"{path}: it has the columns of no known form (found {names}): "
                                f"they are {conversations.described()}")  # fmt: skip
            for batch in file.iter_batches(batch_size=256, columns=known):
                size += batch.nbytes
                if size > LIMIT:
                    raise UserError(f"{path} unpacks to more than the {LIMIT:,} bytes that are read")
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield f"row {number}", without_null(row)
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as Parquet ({why}): save it again") from None


def without_null(value: Any) -> Any:
    """The value without null in objects, at any depth."""
    if isinstance(value, dict):
        return {key: without_null(inner) for key, inner in value.items() if inner is not None}
    return [without_null(inner) for inner in value] if isinstance(value, list) else value


# Kinds of file by the end of their names: what they are, and their reader. All but Parquet may be compressed (.gz).
FILES: dict[str, tuple[str, Callable[[Path, bytes], Placed]]] = {
    ".jsonl": ("a JSON object on each line", json_lines),
    ".ndjson": ("a JSON object on each line", json_lines),
    ".json": ("a list of JSON objects, or one on each line", json_list),
    ".csv": ("a table, separated by commas, whose first line names the columns", table(",")),
    ".tsv": ("the same, separated by tabs", table("\t")),
    ".parquet": ("Parquet as Hugging Face's datasets save it (needs pyarrow)", parquet),
}
