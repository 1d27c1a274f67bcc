"""JSON lines: an object a line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from engine.data.readers.base import Layout, Row


class DuplicateKeyError(ValueError):
    """A key stands twice in one object: one of its values would be lost."""


def unique(pairs: list[tuple[str, Any]]) -> Row:
    """Makes an object of its (key, value) pairs; for `json.loads(…, object_pairs_hook=unique)`.

    Raises:
        DuplicateKeyError: a key comes twice.
    """
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKeyError(f"the key '{twice}' comes twice in one object: rename one")
    return row


def problem_of(value: Any, text: str) -> str | None:
    """Says why a JSON value cannot be a row; None when it can.

    Args:
        text: what it was written as.
    """
    if not isinstance(value, dict):
        return f"a row must be a JSON object, not {type(value).__name__}"
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            lone = error.object[error.start]
            return f"\\u{ord(lone):04x} is half a character (a lone surrogate), which is no text: write the row anew"
    return None


class JsonLines(Layout):
    """An object a line; blank lines are left out."""

    NAME = "jsonl"
    EXTENSIONS = (".jsonl", ".ndjson", ".jsonlines", ".json")

    @property
    def describe(self) -> str:
        """The layout in words."""
        return f"JSON lines, {self.head.encoded}"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, row)."""
        for line, text in enumerate(itertools.islice(self.text(), lines), 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text, object_pairs_hook=unique)
            except json.JSONDecodeError as error:
                raise self.broken(line, f"not valid JSON: {error.msg} at column {error.colno}") from None
            except DuplicateKeyError as error:
                raise self.broken(line, str(error)) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(line, f"not readable JSON: {error}") from None
            problem = problem_of(row, text)
            if problem:
                raise self.broken(line, problem)
            yield line, row
