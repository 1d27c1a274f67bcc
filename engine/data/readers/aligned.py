"""Line-aligned text: several files, and line i of each makes row i."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from engine.data.readers.base import FormatConfig, Head, Layout, Row
from engine.data.readers.files import TextFile
from engine.errors import UserError


class Aligned(Layout):
    """A file a column; lines that are blank in all files are left out."""

    NAME = "aligned"
    EXTENSIONS = ()

    def __init__(self, heads: dict[str, Head], options: FormatConfig) -> None:
        super().__init__(next(iter(heads.values())), options)
        self.heads = heads

    @property
    def describe(self) -> str:
        """The layout in words."""
        files = (f"{column} from {head.path.name} ({head.encoded})" for column, head in self.heads.items())
        return f"line-aligned text: {', '.join(files)}"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, {column: the line of its file, without the spaces around it}).

        Raises:
            UserError: one file ends before another.
        """
        files = [TextFile(head.path, head.encoding) for head in self.heads.values()]
        for line, texts in enumerate(itertools.islice(itertools.zip_longest(*files), lines), 1):
            if None in texts:
                short, long = files[texts.index(None)], next(file for file in files if file.line == line)
                raise UserError(
                    f"{short.path}:{line - 1}: ends here, but {long.path} goes on: line by line they must belong together"
                )
            if any(text.strip() for text in texts):
                yield line, {column: text.strip() for column, text in zip(self.heads, texts, strict=True)}
