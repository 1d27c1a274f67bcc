"""fastText's training files: words of a text, and its labels with a prefix among them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from engine.data.readers.base import Head, Layout, Row

PREFIX = "__label__"
_LABEL = re.compile(rf"(?:^|(?<=\s)){PREFIX}(\S+)\s?")


class FastText(Layout):
    """`__label__x text`: columns `label` (a list when there are several or none) and `text`."""

    NAME = "fasttext"
    EXTENSIONS = (".txt", ".text", ".ft", ".fasttext")

    @classmethod
    def accepts(cls, head: Head) -> bool:
        """Says whether the first line begins with a label."""
        return head.first.startswith(PREFIX)

    @property
    def describe(self) -> str:
        """The layout in words."""
        return f"fastText ({PREFIX}…), {self.head.encoded}"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, {"text", "label"})."""
        for line, text in enumerate(itertools.islice(self.text(), lines), 1):
            if not text.strip():
                continue
            labels = _LABEL.findall(text)
            label = labels[0] if len(labels) == 1 else labels
            yield line, {"text": _LABEL.sub("", text).strip(), "label": label}
