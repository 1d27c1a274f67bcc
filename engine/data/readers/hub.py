"""Data sets of the Hugging Face hub, and directories that `datasets` has saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config import HUB
from engine.data.readers.base import FormatConfig, Head, Layout, Row
from engine.data.readers.parquet import EXTRA, named
from engine.errors import UserError, did_you_mean


class Hub(Layout):
    """`hub:OWNER/NAME`, or a saved directory; where others have lines it has rows, counted from 1."""

    NAME = "hub"
    EXTENSIONS = ()
    TEXT = False
    OPTIONS = ("subset", "split")

    def __init__(self, name: str | Path, options: FormatConfig) -> None:
        super().__init__(Head(Path(name), "", [], True, "", False), options)
        self.name = name
        self.split = options.split or "train"

    @property
    def describe(self) -> str:
        """The layout in words."""
        subset = f"subset {self.options.subset}, " if self.options.subset else ""
        return f"data set of the hub's library, {subset}split {self.split}"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (row number, row); numbers of classes become their names."""
        dataset = self._load()
        kinds = {column: getattr(feature, "feature", feature) for column, feature in dataset.features.items()}
        names = {column: kind.names for column, kind in kinds.items() if hasattr(kind, "names")}
        for number, row in enumerate(dataset, 1):
            if lines is not None and number > lines:
                return
            yield number, named(row, names)

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise UserError(f"{self.name}: data sets of the hub need an extra: {EXTRA}") from None
        datasets.disable_progress_bars()
        try:
            if isinstance(self.name, Path):
                found = datasets.load_from_disk(str(self.name))
            else:
                found = datasets.load_dataset(self.name.removeprefix(HUB), self.options.subset, split=self.split)
        except Exception as error:  # of the network, of the hub, of what it holds: many kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.name}: cannot be read ({self.describe}): {reason}") from None
        if isinstance(found, dict):
            if self.split not in found:
                raise UserError(f"{self.name}: no split '{self.split}'{did_you_mean(self.split, list(found))}")
            found = found[self.split]
        return found
