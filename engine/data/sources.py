"""Readers of the formats that people have: JSON lines, CSV, TSV and plain text, each also gzipped.

A row is a dict of column name to value. Every error names the file and the line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from engine.config import FileRef, Fraction, Recipe, Strict
from engine.errors import UserError, did_you_mean

Row = dict[str, Any]
"""Column name to value."""


class PlacedRow(Row):
    """A row that knows where it stands in its file, for messages."""

    __slots__ = ("line", "path")

    def __init__(self, values: Row, path: Path, line: int) -> None:
        super().__init__(values)
        self.path, self.line = path, line


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_FORMATS = (".jsonl", ".csv", ".tsv", ".txt")


class SourceConfig(Strict):
    """One file of rows; a bare string stands for its path."""

    path: FileRef
    """`.jsonl`, `.csv`, `.tsv` (with a header line) or `.txt` (a row a line, column `text`); `.gz` may follow."""
    where: dict[str, str | int | float | bool] = {}
    """Keep only the rows whose columns hold these values."""
    share: Fraction = 1.0
    """Keep only this share of the rows, chosen by a hash of the row: a sample that is the same on every machine."""
    limit: int | None = None
    """Keep only this many rows, from the top."""


Source = Annotated[SourceConfig, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)]


def source_format(path: Path) -> str:
    """Returns the extension that says how to read `path`, without `.gz`."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in _FORMATS:
        raise UserError(f"{path}: unknown format '{suffix or path.name}': use one of {', '.join(_FORMATS)}, optionally with .gz")
    return suffix


def read_rows(source: SourceConfig, recipe: Recipe, columns: list[str], lines: int | None = None) -> Iterator[Row]:
    """Yields every kept row.

    Args:
        source: the file and its filter.
        recipe: finds the file.
        columns: the columns that must be present and filled in every kept row.
        lines: look no further than this line; the rows that are kept may then all lie behind it.

    Raises:
        UserError: unreadable file, malformed line, missing or empty column; names file and line.
    """
    path = recipe.find_file(source.path)
    kept = line = 0
    for line, row in parse_file(path, lines):
        if any(key not in row for key in source.where):
            missing = next(key for key in source.where if key not in row)
            raise UserError(f"{path}:{line}: no column '{missing}' to filter by{did_you_mean(missing, list(row))}")
        if any(str(row[key]) != str(value) for key, value in source.where.items()):
            continue
        if source.share < 1 and share_of(f"sample\t{json.dumps(row, sort_keys=True)}") >= source.share:
            continue
        if source.limit is not None and kept >= source.limit:
            return
        for column in columns:
            if column not in row:
                raise UserError(f"{path}:{line}: no column '{column}' in this row{did_you_mean(column, list(row))}")
            if row[column] is None or row[column] == "":
                raise UserError(f"{path}:{line}: column '{column}' is empty in this row")
        kept += 1
        yield PlacedRow(row, path, line)
    if kept == 0 and (lines is None or line < lines):
        raise UserError(
            f"{path}: no rows" + (f" where {source.where}" if source.where else "") + ": an empty data set cannot be used"
        )


def _open(path: Path) -> io.TextIOWrapper:
    opened = gzip.open if path.suffix == ".gz" else open
    return io.TextIOWrapper(opened(path, "rb"), encoding="utf-8-sig", newline="")


def parse_file(path: Path, lines: int | None = None) -> Iterator[tuple[int, Row]]:
    """Yields (line number, row) of every row of a file, as it stands there; with `lines`, no further than that line.

    Raises:
        UserError: unreadable file or malformed line; names file and line.
    """
    suffix = source_format(path)
    line = 0
    try:
        with _open(path) as file:
            if suffix == ".jsonl":
                for line, text in enumerate(itertools.islice(file, lines), 1):
                    if text.strip():
                        yield line, _json_row(path, line, text)
            elif suffix == ".txt":
                for line, text in enumerate(itertools.islice(file, lines), 1):
                    if text.strip():
                        yield line, {"text": text.strip()}
            else:
                # Quotes mean nothing in a TSV: a lone one is part of the text.
                quoting: Any = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL
                reader = csv.reader(file, delimiter=_DELIMITERS[suffix], quoting=quoting, strict=suffix == ".csv")
                header = next(reader, None)
                for cells in reader:
                    line = reader.line_num
                    if lines is not None and line > lines:
                        return
                    if not cells:
                        continue
                    if header is None or len(cells) != len(header):
                        raise UserError(f"{path}:{line}: {len(cells)} columns where the header has {len(header or [])}")
                    yield line, dict(zip(header, cells, strict=True))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise UserError(f"{path}:{line + 1}: cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _json_row(path: Path, line: int, text: str) -> Row:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line}: not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{line}: a row must be a JSON object, not {type(row).__name__}")
    return row


def share_of(text: str) -> float:
    """Maps a text to a number in [0, 1) by its SHA-256: the same text always falls on the same side of a split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
