"""JSON lines as doccano exports them: a text, and spans in `label`, `labels` or `entities`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from engine.data.readers.base import Head, Row
from engine.data.readers.jsonl import JsonLines

LABELS = ("label", "labels", "entities")
TEXTS = ("text", "data")
"""What its versions have called the column."""


class Doccano(JsonLines):
    """`{"id", "text", "label": [[start, end, type], …]}`; or `entities`, objects with start_offset, end_offset and label.

    The text is called `text`, the spans `label`, whatever they were called.
    """

    NAME = "doccano"

    @classmethod
    def accepts(cls, head: Head) -> bool:
        """Says whether a first line has spans."""
        return any(_spans_key(line) is not None for line in head.lines[:50])

    @property
    def describe(self) -> str:
        """The layout in words."""
        return f"doccano's JSON lines with spans, {self.head.encoded}"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, row)."""
        key = next((found for found in map(_spans_key, self.head.lines) if found is not None), LABELS[0])
        for line, row in super().rows(lines):
            text = next((name for name in TEXTS if name in row), TEXTS[0])
            rest = {name: value for name, value in row.items() if name not in (text, key)}
            named = {"text": row.get(text), **rest}
            yield line, {**named, "label": row[key]} if key in row else named


def _spans_key(line: str) -> str | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not any(isinstance(row.get(name), str) for name in TEXTS):
        return None
    lists = [name for name in LABELS if isinstance(row.get(name), list) and row[name]]
    return next((name for name in lists if all(map(_is_span, row[name]))), None)


def _is_span(span: Any) -> bool:
    if isinstance(span, dict):
        return {"start_offset", "end_offset", "label"} <= span.keys()
    return isinstance(span, list) and len(span) == 3 and type(span[0]) is type(span[1]) is int and isinstance(span[2], str)
