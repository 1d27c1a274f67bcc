"""Plain text, a row a line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from engine.data.readers.base import Layout, Row


class Lines(Layout):
    """A row a line, column `text`; blank lines are left out."""

    NAME = "lines"
    EXTENSIONS = (".txt", ".text")

    @property
    def describe(self) -> str:
        """The layout in words."""
        return f"text, a row a line, {self.head.encoded}"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, {"text": line})."""
        for line, text in enumerate(itertools.islice(self.text(), lines), 1):
            if text.strip():
                yield line, {"text": text.strip()}
