"""Directories as ATIS and SNIPS come: words in `seq.in`, tags of slots in `seq.out`, intents in `label`, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.data.readers.aligned import Aligned
from engine.data.readers.base import Row
from engine.errors import UserError

FILES = {"tokens": "seq.in", "slots": "seq.out", "intent": "label"}
"""{column: its file}."""


class Atis(Aligned):
    """Columns `tokens` and `slots`, lists of equal length, and `intent`."""

    NAME = "atis"

    @classmethod
    def lies_in(cls, directory: Path) -> bool:
        """Says whether a directory has this layout."""
        return (directory / FILES["tokens"]).is_file()

    @classmethod
    def files(cls, directory: Path) -> dict[str, Path]:
        """Returns {column: its file}.

        Raises:
            UserError: one is missing.
        """
        missing = next((name for name in FILES.values() if not (directory / name).is_file()), None)
        if missing is not None:
            raise UserError(f"{directory / missing}: no such file: {', '.join(FILES.values())} belong together line by line")
        return {column: directory / name for column, name in FILES.items()}

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, row).

        Raises:
            UserError: one file ends before another, or a line has more words than tags, or fewer.
        """
        for line, row in super().rows(lines):
            row |= {column: row[column].split() for column in ("tokens", "slots")}
            if len(row["tokens"]) != len(row["slots"]):
                path = self.heads["slots"].path
                raise UserError(
                    f"{path}:{line}: {len(row['slots'])} tags for the {len(row['tokens'])} words in {FILES['tokens']}"
                )
            yield line, row
