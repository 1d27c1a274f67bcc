"""Train, validation and test rows: separate files, or shares of one file by a hash of the text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator, model_validator

from engine.config import Fraction, Recipe, Strict
from engine.data.cells import Cell
from engine.data.readers import Row
from engine.data.sources import SHOWN, Source, SourceConfig, SourceRows, share_of
from engine.errors import UserError


def _share_or_source(value: Any) -> Any:
    """A number or percentage is a share of `train`; anything else names a file."""
    if isinstance(value, list) or (isinstance(value, str) and not value.strip().endswith("%")):
        return {"path": value}
    return value


Part = Annotated[SourceConfig | Fraction | None, BeforeValidator(_share_or_source)]


class DataConfig(Strict):
    """Where the rows of a stage come from."""

    train: Source
    validation: Part = 0.1
    """A file, or the share of `train` that is held out by a hash of its text (equal texts stay together)."""
    test: Part = None
    """A file, or a share of `train`; evaluated once, after training."""

    @model_validator(mode="after")
    def _leaves_rows_to_train(self) -> DataConfig:
        shares = [part for part in (self.validation, self.test) if isinstance(part, float)]
        if sum(shares) >= 1:
            raise ValueError(f"validation and test take {sum(shares):.0%} of train and leave nothing to train on: lower them")
        return self


class Splits(dict[str, Sequence[Row]]):
    """{"train": rows, "validation": rows, "test": rows}; absent splits are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        """What is to be said about the files and the splits, a fact a line."""


class Sink(Protocol):
    """Takes the rows of one split."""

    def append(self, row: Row) -> None:
        """Takes one row."""

    def close(self) -> Sequence[Row]:
        """Returns all of them."""


class Held(list[Row]):
    """Rows in memory, not more than `limit` of them."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = limit

    def append(self, row: Row) -> None:
        """Takes one row while there is room."""
        if self.limit is None or len(self) < self.limit:
            super().append(row)

    def close(self) -> Sequence[Row]:
        """Returns the rows."""
        return self


def load_splits(
    data: DataConfig,
    recipe: Recipe,
    key: str,
    columns: Mapping[str, Cell],
    classes_of: Callable[[Row], Collection[Any]] = lambda row: (),
    new: Callable[[str], Sink] = lambda name: Held(),
) -> Splits:
    """Reads every split.

    Args:
        data: the files and shares.
        recipe: finds the files.
        key: the column whose hash decides a row's split.
        columns: the columns that every row must fill, and what is made of their cells.
        classes_of: the classes of a row: shares leave each of them a row to train on.
        new: makes what takes the rows of a split of that name, in memory or on disk.

    Raises:
        UserError: bad file or row (file and line), or a split without rows.
    """
    splits = Splits()
    sinks = {name: new(name) for name in parts_of(data)}
    shares = [name for name, part in parts_of(data).items() if not isinstance(part, SourceConfig)]
    trained: set[Any] = set()
    held: dict[Any, str] = {}
    """Label to that of its held-out texts with the largest hash, the first that a smaller share would leave in training."""
    for name, row in iter_splits(data, recipe, key, columns, splits.notes):
        sinks[name].append(row)
        if name == "train":
            trained.update(classes_of(row))
        elif name in shares:
            for label in classes_of(row):
                if label not in held or share_of(str(row[key])) > share_of(held[label]):
                    held[label] = str(row[key])
    lost = {label: text for label, text in held.items() if label not in trained}
    moved = set(lost.values())
    for name in shares if lost else []:
        rows = sinks[name].close()
        sinks[name] = new(name)
        for row in rows:
            sinks["train" if str(row[key]) in moved else name].append(row)
    if lost:
        shown = ", ".join(sorted(map(str, lost))[:SHOWN]) + (", …" if len(lost) > SHOWN else "")
        splits.notes.append(f"{len(lost)} classes of which all rows would have been held out got one text to train on: {shown}")
    for name, sink in sinks.items():
        splits[name] = sink.close()
        if not splits[name]:
            raise UserError(f"{data.train.shown}: the {name} split is empty: give more rows or another share")
    return splits


def parts_of(data: DataConfig) -> dict[str, SourceConfig | float]:
    """Returns {name of a split: its files, or its share of `train`}, as they are read: the training rows last."""
    parts = {"test": data.test, "validation": data.validation, "train": data.train}
    return {name: part for name, part in parts.items() if part}


def iter_splits(
    data: DataConfig, recipe: Recipe, key: str, columns: Mapping[str, Cell], notes: list[str]
) -> Iterator[tuple[str, Row]]:
    """Yields (name of its split, row) of every row, one in memory at a time; `notes` gets what is to be said, see load_splits."""
    shares: list[tuple[str, float, float]] = []
    low = 0.0
    for split, part in parts_of(data).items():
        if not isinstance(part, SourceConfig):
            shares.append((split, low, low + part))
            low += part
            continue
        rows = SourceRows(part, recipe, columns)
        cut = shares if split == "train" else []
        for row in rows:
            share = share_of(str(row[key])) if cut else 1.0
            yield next((name for name, low, high in cut if low <= share < high), split), row
        notes += [note for note in rows.describe if note not in notes]
