"""Where rows come from: files, Hub datasets, Python functions; each with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.errors import DataError
from toolkit.recipe.data import DataSource
from toolkit.recipe.paths import resolve_path
from toolkit.user_code import line_in, load_function


class RawRow(NamedTuple):
    """A row as its source has it, or the reason why it could not be read."""

    where: str
    """``tickets.jsonl:12``; ``rows.parquet row 3`` where a format has no lines."""
    values: Any
    """The row by column; None when there is a problem."""
    problem: str | None = None


def source_name(source: DataSource) -> str:
    """What the ledger and errors call a source: what the recipe says."""
    return str(source.path or source.python or f"{source.hub}:{source.split}")


def read_source(source: DataSource, folder: Path) -> Iterator[RawRow]:
    """Yield the rows of a source with ``columns`` applied.

    Args:
        source: A source of the recipe.
        folder: The recipe's folder, where relative paths start.

    Raises:
        DataError: The source is missing, of an unknown kind, or broken as a whole. A single bad row
            is yielded with its problem instead, for ``on_invalid`` to decide.
    """
    unseen = set(source.columns)
    for raw in _rows(source, folder):
        if raw.values is None or isinstance(raw.values, Mapping):
            unseen.difference_update(raw.values or ())
            yield _renamed(raw, source.columns)
        else:
            yield RawRow(
                raw.where, None, f"the row is a {type(raw.values).__name__}, not an object"
            )
    if unseen:
        raise DataError(
            f"{source_name(source)}: `columns` renames {', '.join(map(repr, sorted(unseen)))}, "
            "which no row has",
            "write the column's name as the source has it",
        )


def _rows(source: DataSource, folder: Path) -> Iterator[RawRow]:
    if source.python is not None:
        return _call(source.python, source.arguments, folder)
    if source.hub is not None:
        return _read_hub(source)
    path = resolve_path(source.path or "", folder)
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise DataError(
            f"{source.path}: {path.suffix or 'no suffix'} is not a kind of data file",
            f"use {', '.join(readers)}",
        )
    if not path.is_file():
        raise DataError(
            f"{source.path}: no such file (looked for {path})",
            "paths start at the folder of the recipe",
        )
    return readers[path.suffix](path)


def _renamed(raw: RawRow, columns: Mapping[str, str]) -> RawRow:
    if not columns or raw.values is None:
        return raw
    values = {columns.get(column, column): value for column, value in raw.values.items()}
    if len(values) < len(raw.values):
        return RawRow(raw.where, None, "`columns` gives one name to two columns of the row")
    return RawRow(raw.where, values)


# --- files ----------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                yield RawRow(where, json.loads(line.rstrip(b"\r\n").decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                yield RawRow(
                    where, None, f"not UTF-8 at byte {error.start}: save the file as UTF-8"
                )
            except json.JSONDecodeError as error:
                yield RawRow(
                    where,
                    None,
                    f"not JSON: {error.msg} at column {error.colno}; "
                    "every line of a .jsonl file is one JSON object",
                )


def _read_json(path: Path) -> Iterator[RawRow]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name}: not UTF-8 at byte {error.start}", "save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}",
            "a .json file is one list of rows; a file with one row per line is .jsonl",
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path.name}: holds a {type(rows).__name__}, not a list of rows",
            "write it as [{...}, {...}], or as .jsonl with one row per line",
        )
    for number, row in enumerate(rows, start=1):
        yield RawRow(f"{path.name} row {number}", row)


def _read_csv(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="\0extra")
        try:
            for row in reader:
                yield _csv_row(f"{path.name}:{reader.line_num}", row)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path.name}: not UTF-8 after line {reader.line_num}", "save it as UTF-8"
            ) from error
        except csv.Error as error:
            raise DataError(
                f"{path.name}:{reader.line_num}: {error}", "check the quotes of this line"
            ) from error


def _csv_row(where: str, row: dict[str, Any]) -> RawRow:
    fields = len(row) - ("\0extra" in row)
    if "\0extra" in row:
        found = fields + len(row["\0extra"])
        return RawRow(
            where, None, f"has {found} fields, the header has {fields}: quote fields with commas"
        )
    if None in row.values():
        found = sum(value is not None for value in row.values())
        return RawRow(where, None, f"has {found} fields, the header has {fields}")
    return RawRow(where, row)


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(f"{path.name} row {number}", row)
    except pa.ArrowException as error:
        raise DataError(
            f"{path.name}: not a readable Parquet file: {error}", "write it again"
        ) from error


# --- elsewhere ------------------------------------------------------------------------------------


def _read_hub(source: DataSource) -> Iterator[RawRow]:
    import datasets

    name = f"{source.hub}:{source.split}"
    try:
        rows = datasets.load_dataset(
            source.hub, source.subset, split=source.split, revision=source.revision
        )
    except (OSError, ValueError) as error:  # not found, no network, no such subset or split
        raise DataError(
            f"the Hub dataset {source.hub} at {source.revision} cannot be loaded: {error}",
            "check id, revision, subset and split, and that the Hub can be reached (HF_TOKEN for a "
            "private dataset)",
        ) from error
    for number, row in enumerate(rows, start=1):
        yield RawRow(f"{name} row {number}", row)


def _call(reference: str, arguments: Mapping[str, Any], folder: Path) -> Iterator[RawRow]:
    function = load_function(
        reference, folder, who=reference, error=DataError, signature="a function that yields dicts"
    )
    try:
        for number, row in enumerate(function.call(**arguments), start=1):
            yield RawRow(f"{reference} row {number}", row)
    except DataError:
        raise
    except Exception as error:  # the user's code may raise anything, and it is the user's to mend
        raise DataError(
            f"{reference} failed: {type(error).__name__}: {error}{line_in(error, function.file)}",
            f"it was called with {dict(arguments)!r} and must yield dicts",
        ) from error
