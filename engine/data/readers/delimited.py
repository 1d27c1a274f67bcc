"""Delimited text: CSV and TSV in the dialects that spreadsheets, databases and scripts write."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.data.readers.base import FormatConfig, Head, Layout, Row

DELIMITERS = ",;\t|"
_NAMES = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
csv.field_size_limit(2**30)  # characters of a cell; Python's own limit, 128 KiB, is shorter than many a document

_NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Dialect:
    """How lines are cut into cells."""

    delimiter: str
    quoting: str
    """`doubled`, `backslash` or `none`: how a quote inside quotes is written, or that quotes are plain characters."""

    def reader(self, lines: Any, strict: bool = True) -> Any:
        """Returns the reader of Python's csv over an iterable of lines."""
        if self.quoting == "none":
            return csv.reader(lines, delimiter=self.delimiter, quoting=csv.QUOTE_NONE)
        escape: dict[str, Any] = {"doublequote": False, "escapechar": "\\"} if self.quoting == "backslash" else {}
        return csv.reader(lines, delimiter=self.delimiter, strict=strict, **escape)

    def table(self, lines: list[str], whole: bool) -> tuple[list[list[str]], bool]:
        """Returns (rows of the sample, whether all of it follows this dialect); a last row that the sample cuts is no fault."""
        rows: list[list[str]] = []
        reader = self.reader(lines)
        try:
            rows += (cells for cells in reader if cells)
        except csv.Error as error:
            return rows, not whole and str(error) == "unexpected end of data"
        return rows, True


def share_of_equal_rows(rows: list[list[str]]) -> float:
    """Returns which share of the rows has as many cells as the first; 0 when that has only one."""
    if not rows or len(rows[0]) < 2:
        return 0.0
    return sum(len(cells) == len(rows[0]) for cells in rows) / len(rows)


def find_dialect(head: Head, options: FormatConfig) -> Dialect:
    """Returns the dialect that cuts the first lines into equal rows; the usual one of the extension where several do.

    Quotes in a TSV are plain characters, as GLUE has them, unless they are seen to quote: a tab, a line end or a doubled quote
    inside of them.
    """
    own = "\t" if head.extension in (".tsv", ".tab") else ","
    delimiters = [options.delimiter] if options.delimiter else [own, *DELIMITERS.replace(own, "")]
    best, best_score = Dialect(delimiters[0], options.quoting or ("none" if own == "\t" else "doubled")), (-1.0, -1)
    for delimiter in delimiters:
        for place, quoting in enumerate([options.quoting] if options.quoting else _quotings(head, delimiter)):
            dialect = Dialect(delimiter, quoting)
            rows, clean = dialect.table(head.lines, head.whole)
            score = (share_of_equal_rows(rows) if clean else share_of_equal_rows(rows) / 2, -place)
            if score[0] > best_score[0] + 1e-9:
                best, best_score = dialect, score
    return best


def _quotings(head: Head, delimiter: str) -> list[str]:
    if delimiter == "\t":
        rows, clean = Dialect(delimiter, "doubled").table(head.lines, head.whole)
        quoted = any('"' in cell or "\t" in cell or "\n" in cell for cells in rows for cell in cells)
        plain = Dialect(delimiter, "none").table(head.lines, head.whole)[0]
        opens = any(cell.startswith('"') for cells in plain for cell in cells)
        if clean and quoted and opens and share_of_equal_rows(rows) == 1.0:
            return ["doubled"]
        return ["none"]
    return ["doubled", "backslash"]


def is_header(cells: list[str]) -> bool:
    """Says whether the first line names columns: no number stands in it, or it just counts its columns from 0."""
    counted = [cell.strip() for cell in cells] == [str(index) for index in range(len(cells))]
    return counted or not any(_NUMBER.fullmatch(cell.strip()) for cell in cells)


class Delimited(Layout):
    """Cells between delimiters."""

    NAME = "csv"
    EXTENSIONS = (".csv", ".tsv", ".tab")
    OPTIONS = ("encoding", "delimiter", "quoting", "header", "bad_lines")

    def __init__(self, head: Head, options: FormatConfig) -> None:
        super().__init__(head, options)
        self.dialect = find_dialect(head, options)
        first = next(iter(self.dialect.table(head.lines, head.whole)[0]), [])
        self.named = options.header if isinstance(options.header, bool) else not options.header and is_header(first)
        """The first line names the columns."""
        self.columns: list[str] = first
        if not self.named:
            self.columns = options.header if isinstance(options.header, list) else [str(i) for i in range(1, len(first) + 1)]
        twice = next((name for name in self.columns if self.columns.count(name) > 1), None)
        if twice is not None:
            raise self.broken(1, f"two columns are called '{twice}', and only one could be read: rename one")

    @property
    def describe(self) -> str:
        """The layout in words."""
        quotes = {"none": "quotes are plain characters", "backslash": "backslash before quotes", "doubled": ""}
        if self.named:
            header = "header"
        elif self.options.header:
            header = "header given"
        else:
            header = f"no header (columns 1 to {len(self.columns)})"
        delimiter = _NAMES.get(self.dialect.delimiter, repr(self.dialect.delimiter))
        parts = [f"CSV with {delimiter}", header, quotes[self.dialect.quoting], self.head.encoded]
        return ", ".join(part for part in parts if part)

    @property
    def hint(self) -> str:
        """What to try when a column is not there."""
        if self.options.header is not None:
            return ""
        if self.named:
            return "; if the first line is a row, name the columns: header: [text, label]"
        return "; if the first line names the columns, set header: true; if not, name them: header: [text, label]"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, row); a row's line is the one on which it ends."""
        reader = self.dialect.reader(self.text())
        self.left_out = 0
        try:
            for cells in itertools.islice(reader, 1 if self.named else 0, None):
                line = reader.line_num
                if lines is not None and line > lines:
                    return
                if not cells:
                    continue
                if len(cells) != len(self.columns) and self.options.bad_lines == "drop":
                    self.left_out += 1
                    continue
                if len(cells) != len(self.columns):
                    where = "the header has" if self.named else "there should be"
                    fix = "mend it, or leave such lines out (bad_lines: drop)"
                    raise self.broken(line, f"{len(cells)} columns where {where} {len(self.columns)}: {fix}")
                yield line, dict(zip(self.columns, cells, strict=True))
        except csv.Error as error:
            fix = "mend the quotes, or set quoting (doubled, backslash, none) or delimiter"
            raise self.broken(reader.line_num, f"cannot be read as {self.describe}: {error}: {fix}") from None
