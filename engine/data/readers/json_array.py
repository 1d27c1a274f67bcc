"""One JSON array of objects, read piece by piece: only one row has to fit into memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from engine.data.readers.base import Head, Layout, Row
from engine.data.readers.jsonl import DuplicateKeyError, problem_of, unique

PIECE = 2**16
"""Characters read at a time."""
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonArray(Layout):
    """Objects between `[` and `]`. A row's line is the one on which it begins."""

    NAME = "json"
    EXTENSIONS: ClassVar[tuple[str, ...]] = (".json", ".jsonl", ".ndjson", ".jsonlines")

    @classmethod
    def accepts(cls, head: Head) -> bool:
        """Says whether it begins with a bracket."""
        return head.first.startswith("[")

    @property
    def describe(self) -> str:
        """The layout in words."""
        return f"one JSON array, {self.head.encoded}"

    def begin(self, text: Text, decoder: json.JSONDecoder) -> None:
        """Passes over what stands before the first row."""
        if text.next() != "[":
            raise self.broken(text.line, "not a JSON array of rows: it must begin with [")
        text.skip(1)

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, row); with `lines`, no more rows than that either: all may stand on one line."""
        text, line, number = Text(iter(self.text())), 1, 0
        decoder = json.JSONDecoder(object_pairs_hook=unique)
        self.begin(text, decoder)
        while (sign := text.next()) not in ("]", ""):
            if number:
                if sign != ",":
                    raise self.broken(text.line, "not valid JSON: a comma or ] is missing after a row")
                text.skip(1)
                text.next()
            line, number = text.line, number + 1
            if lines is not None and (line > lines or number > lines):
                return
            row, end = self.value(text, decoder)
            problem = problem_of(row, text.written(end))
            if problem:
                raise self.broken(line, problem)
            text.skip(end)
            yield line, row
        if not sign:
            raise self.broken(text.line, "the array is cut short: its ] is missing")

    def value(self, text: Text, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """Returns (the value that begins here, its length in characters)."""
        try:
            return text.decode(decoder)
        except DuplicateKeyError as error:
            raise self.broken(text.line, str(error)) from None
        except json.JSONDecodeError as error:
            raise self.broken(error.lineno, f"not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise self.broken(text.line, f"not readable JSON: {error}") from None


class Text:
    """A text that is read as far as it is needed; what was used is forgotten."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines, self.buffer, self.at, self.line = lines, "", 0, 1

    def more(self, size: int) -> bool:
        """Reads at least `size` characters on; False at the end."""
        parts, read = [self.buffer[self.at :]], 0
        for part in self.lines:
            parts.append(part)
            read += len(part)
            if read >= size:
                break
        if read:
            self.buffer, self.at = "".join(parts), 0
        return read > 0

    def next(self) -> str:
        """Passes over white space; returns the next character, "" at the end."""
        while True:
            match = _SPACE.match(self.buffer, self.at)
            assert match is not None
            self.skip(match.end() - self.at)
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more(PIECE):
                return ""

    def skip(self, size: int) -> None:
        """Passes over `size` characters."""
        self.line += self.buffer.count("\n", self.at, self.at + size)
        self.at += size

    def written(self, size: int) -> str:
        """Returns the next `size` characters."""
        return self.buffer[self.at : self.at + size]

    def decode(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """Returns (the value that begins here, its length), reading on until it is whole."""
        size = PIECE
        while True:
            try:
                value, end = decoder.raw_decode(self.buffer, self.at)
                return value, end - self.at
            except json.JSONDecodeError as error:
                if not self.more(size):
                    error.lineno = self.line + self.buffer.count("\n", self.at, error.pos)
                    raise
                size *= 2
