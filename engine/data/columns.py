"""What the columns of a file hold, seen in its first rows: from this a recipe is proposed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from engine.config import Recipe
from engine.data.cells import missing
from engine.data.sources import SourceConfig, SourceRows
from engine.errors import UserError, did_you_mean

FIRST_LINES = 20_000
"""Lines of a file that are looked at."""
MOST_VALUES = 10_000
"""Different values of a column that are counted; with more it is no set of classes."""
SAMPLE = 1000
"""Texts of a column that are kept, to count their tokens."""


@dataclass
class Column:
    """One column of a table."""

    name: str
    filled: int = 0
    """Rows in which it holds something."""
    nested: int = 0
    """Rows in which it holds an object, or a list of more than one."""
    words: int = 0
    """Words of all values, between spaces."""
    characters: int = 0
    """Characters of all values."""
    values: Counter[str] = field(default_factory=Counter)
    """How often each value comes, of the first MOST_VALUES different ones."""
    sample: list[str] = field(default_factory=list)
    """The first values, as text."""
    raw: list[Any] = field(default_factory=list)
    """The same as they are."""

    def add(self, value: Any) -> None:
        """Counts one cell."""
        if missing(value):
            return
        self.filled += 1
        self.nested += isinstance(value, dict) or (isinstance(value, (list, tuple)) and len(value) != 1)
        text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        self.words += len(text.split())
        self.characters += len(text)
        if text in self.values or len(self.values) < MOST_VALUES:
            self.values[text] += 1
        if len(self.sample) < SAMPLE:
            self.sample.append(text)
            self.raw.append(value)

    @property
    def mean_words(self) -> float:
        """Words of a value on average."""
        return self.words / max(1, self.filled)

    @property
    def mean_characters(self) -> float:
        """Characters of a value on average."""
        return self.characters / max(1, self.filled)


@dataclass(frozen=True)
class Table:
    """The first rows of a source."""

    source: SourceConfig
    rows: int
    complete: bool
    """These are all rows."""
    columns: dict[str, Column]
    described: list[str]
    """How its files are laid out, a fact a line."""

    def column(self, name: str) -> Column:
        """Returns a column.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.columns:
            raise UserError(f"{self.source.shown}: no column '{name}'{did_you_mean(name, list(self.columns))}")
        return self.columns[name]

    @property
    def shown(self) -> str:
        """The columns in words."""
        parts = (
            f"{name} ({column.mean_words:.0f} words, {len(column.values):,} different values)"
            for name, column in self.columns.items()
        )
        return ", ".join(parts)


@dataclass(frozen=True)
class Proposal:
    """How a task would read a table."""

    section: dict[str, Any]
    """Its section of the recipe, without the type."""
    seen: dict[str, str]
    """{key of the section: what was seen in the data that speaks for it}."""
    texts: list[str]
    """Columns that a model would read."""
    fit: float = 1.0
    """How well the columns fit, beside other tasks that could read them."""
    advice: str = ""
    """A key of the section that is worth a thought, as a line of YAML; it is written as a comment."""


def read_table(source: SourceConfig, recipe: Recipe) -> Table:
    """Looks at the first rows of a source.

    Raises:
        UserError: it cannot be read, or holds no rows.
    """
    rows = SourceRows(source, recipe, {}, FIRST_LINES)
    columns: dict[str, Column] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(str(name), Column(str(name))).add(value)
    return Table(source, rows.kept, rows.complete, columns, rows.describe)
