"""Sources of rows: files, or several of them, with a filter. A row is a dict of column name to value."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator

from engine.answers import RowError
from engine.config import FileRef, Fraction, Recipe
from engine.data.cells import Cell, CellError, missing, text_cell
from engine.data.readers import FormatConfig, Layout, Row, find_layout
from engine.errors import UserError, did_you_mean

SHOWN = 8
"""Values of a column that a message lists."""


class PlacedRow(Row):
    """A row that knows where it stands in its file, for messages."""

    __slots__ = ("line", "path")

    def __init__(self, values: Row, path: Path, line: int) -> None:
        super().__init__(values)
        self.path, self.line = path, line


@contextlib.contextmanager
def placed(row: Row) -> Iterator[None]:
    """Adds file and line to what is said about a row that was read from one."""
    try:
        yield
    except (UserError, RowError) as error:
        raise UserError(f"{row.path}:{row.line}: {error}" if isinstance(row, PlacedRow) else str(error)) from None


class SourceConfig(FormatConfig):
    """Where rows come from; a bare string, or list of them, stands for `path`."""

    path: FileRef | list[FileRef] | dict[str, FileRef]
    """A file, a pattern or a list of them, read one after the other; or {column: file} of line-aligned text. `.gz`, `.bz2`, `.xz`
    and `.zst` may follow the extension; `hub:OWNER/NAME` is a data set of the hub."""
    where: dict[str, str] = {}
    """Keep only the rows whose columns hold these values, as they are written."""
    share: Fraction = 1.0
    """Keep only this share of the rows, chosen by a hash of the row: a sample that is the same on every machine."""
    limit: int | None = None
    """Keep only this many rows, from the top."""
    missing: Literal["refuse", "drop"] = "refuse"
    """Rows that lack a text or a label: name the first one and stop, or leave them all out and count them."""

    @field_validator("where", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: wanted if isinstance(wanted, str) else json.dumps(wanted) for key, wanted in value.items()}

    @field_validator("path")
    @classmethod
    def _some_file(cls, value: Any) -> Any:
        if not value:
            raise ValueError("path names no file")
        return value

    @property
    def shown(self) -> str:
        """The path in words."""
        names = self.path.values() if isinstance(self.path, dict) else [self.path] if isinstance(self.path, str) else self.path
        return ", ".join(names)


Source = Annotated[SourceConfig, BeforeValidator(lambda value: {"path": value} if isinstance(value, (str, list)) else value)]


class SourceRows:
    """The rows of one source that are kept; iterate over it to read them.

    Args:
        source: files and filter.
        recipe: finds the files.
        columns: the columns that every kept row must fill, and what is made of their cells.
        lines: look no further than this line of each file; the rows that are kept may then all lie behind it.
        files: only these of its files, which may then hold no row.

    Raises:
        UserError: a file is missing, or its layout unknown.
    """

    def __init__(
        self,
        source: SourceConfig,
        recipe: Recipe,
        columns: Mapping[str, Cell],
        lines: int | None = None,
        files: slice | None = None,
    ) -> None:
        self.source, self.columns, self.lines, self.files = source, columns, lines, files
        self.layouts = [find_layout(found, source) for found in files_of(source, recipe)[files or slice(None)]]
        self.kept = self.dropped = 0
        self.joined: set[str] = set()
        """Text columns in which lists of words were found."""
        self.complete = True
        """No file goes on behind the last line that was looked at."""

    @property
    def describe(self) -> list[str]:
        """Says how the files are laid out and what was done to rows, a fact a line."""
        shown: dict[str, list[Path]] = {}
        for layout in self.layouts:
            shown.setdefault(layout.describe, []).append(layout.path)
        lines = [f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {how}" for how, paths in shown.items()]
        lines += [f"column '{column}' of {self.source.shown} holds lists of words: joined with spaces" for column in self.joined]
        lines += [
            f"{each.path}: {each.left_out:,} lines with too few or too many cells left out"
            for each in self.layouts
            if each.left_out
        ]
        if self.dropped:
            lines.append(f"{self.source.shown}: {self.dropped:,} rows without {' or '.join(self.columns)} left out")
        return lines

    def __iter__(self) -> Iterator[PlacedRow]:
        """Yields every kept row.

        Raises:
            UserError: unreadable file, malformed line, missing or empty column; names file and line.
        """
        self.kept = self.dropped = 0
        self.joined = set()
        seen: dict[str, dict[str, None]] = {column: {} for column in self.source.where}
        self.complete = True
        for layout in self.layouts:
            line = count = 0
            for line, row in layout.rows(self.lines):
                count += 1
                if self.source.limit is not None and self.kept >= self.source.limit:
                    return
                found = PlacedRow(row, layout.path, line)
                if self._wanted(found, seen, layout) and self._filled(found, layout):
                    self.kept += 1
                    yield found
            self.complete = self.complete and (self.lines is None or max(line, count) < self.lines)  # all may stand on one
        if self.kept == 0 and self.complete and self.files is None:
            raise UserError(f"{self.source.shown}: {self._nothing(seen)}: an empty data set cannot be used")

    def _wanted(self, row: PlacedRow, seen: dict[str, dict[str, None]], layout: Layout) -> bool:
        source = self.source
        for column, wanted in source.where.items():
            if column not in row:
                raise UserError(
                    f"{row.path}:{row.line}: no column '{column}' to filter by{did_you_mean(column, list(row))}{layout.hint}"
                )
            if not _holds(row[column], wanted):
                if len(seen[column]) <= SHOWN:
                    seen[column][str(row[column])[:40]] = None
                return False
        return source.share >= 1 or share_of(f"sample\t{json.dumps(row, sort_keys=True, default=str)}") < source.share

    def _filled(self, row: PlacedRow, layout: Layout) -> bool:
        for column, cell in self.columns.items():
            if column not in row:
                raise UserError(
                    f"{row.path}:{row.line}: no column '{column}' in this row{did_you_mean(column, list(row))}{layout.hint}"
                )
            value = row[column]
            try:
                row[column] = cell(value)
            except CellError as error:
                raise UserError(f"{row.path}:{row.line}: column '{column}' {error}") from None
            if missing(row[column]):
                if self.source.missing == "drop":
                    self.dropped += 1
                    return False
                fix = "fill it, or leave such rows out (missing: drop)"
                raise UserError(f"{row.path}:{row.line}: column '{column}' is empty in this row: {fix}")
            if cell is text_cell and isinstance(value, (list, tuple)):
                self.joined.add(column)
        return True

    def _nothing(self, seen: dict[str, dict[str, None]]) -> str:
        if self.dropped:
            return f"no rows: all {self.dropped:,} lack {' or '.join(self.columns)}"
        if not self.source.where:
            return "no rows"
        wanted = ", ".join(f"{column} is '{value}'" for column, value in self.source.where.items())
        column, values = next(((column, values) for column, values in seen.items() if values), ("", {}))
        listed = ", ".join(f"'{value}'" for value in list(values)[:SHOWN]) + (", …" if len(values) > SHOWN else "")
        return f"no rows where {wanted}" + (f" ({column} holds {listed})" if values else "")


def files_of(source: SourceConfig, recipe: Recipe) -> list[Path | str | dict[str, Path]]:
    """Returns what a source is read from, in order: files, data sets, or {column: file}."""
    if isinstance(source.path, dict):
        return [{column: recipe.find_file(path) for column, path in source.path.items()}]
    found: list[Path | str | dict[str, Path]] = []
    for reference in [source.path] if isinstance(source.path, str) else source.path:
        paths = recipe.find_data(reference)
        found += paths if isinstance(paths, list) else [paths]
    return found


def _holds(value: Any, wanted: str) -> bool:
    """Says whether a cell holds what a recipe writes: `no`, `1`, `1.0`, `true`, `null`."""
    if isinstance(value, str) or value is None:
        return value == wanted or (value is None and wanted in ("null", ""))
    if isinstance(value, bool):
        return wanted.lower() == str(value).lower()
    if isinstance(value, (int, float)):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return wanted == str(value)


def read_rows(source: SourceConfig, recipe: Recipe, columns: Mapping[str, Cell], lines: int | None = None) -> Iterator[PlacedRow]:
    """Yields every kept row of a source: see SourceRows."""
    return iter(SourceRows(source, recipe, columns, lines))


def share_of(text: str) -> float:
    """Maps a text to a number in [0, 1) by its SHA-256: the same text always falls on the same side of a split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
